"""Deep Delta Learning: residual streams that rewrite, X ← X + β k (vᵀ − kᵀX).

    from deep_delta import DeepDeltaConfig, DeepDeltaForCausalLM

    model = DeepDeltaForCausalLM(DeepDeltaConfig.from_preset("ddl-cc", "small"))

Importing the package registers the model family with transformers' Auto classes.
"""

from deep_delta.model import (
    DeepDeltaConfig,
    DeepDeltaForCausalLM,
    DeepDeltaForSequenceClassification,
    DeepDeltaModel,
    load_published,
)
from deep_delta.ops import delta_rewrite
from deep_delta.residual import AdditiveResidual, DeltaResidual
from deep_delta.version import __version__

__all__ = [
    "AdditiveResidual",
    "DeepDeltaConfig",
    "DeepDeltaForCausalLM",
    "DeepDeltaForSequenceClassification",
    "DeepDeltaModel",
    "DeltaResidual",
    "__version__",
    "delta_rewrite",
    "load_published",
]
