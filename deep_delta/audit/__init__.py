"""What a trained model does with its state: gates, discrepancies, directions, interventions.

`observe` sees every write from outside, `sublayer` and `directions` gather statistics of it,
`intervene` changes one layer's writes, `run` does all of it on real text. docs/audit.md defines
every statistic.
"""

from deep_delta.audit.run import audit

__all__ = ["audit"]
