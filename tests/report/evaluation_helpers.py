"""A made-up evaluation: no model and no lm-eval."""

from typing import Any

from deep_delta.evaluate.paper import paper_scores
from deep_delta.evaluate.summary import summarise
from deep_delta.evaluate.tasks import TASKS


class Named:
    """What `summarise` reads of a checkpoint."""

    folder = "runs/x/final"
    weights_sha256 = {"model.safetensors": "0" * 64}  # noqa: RUF012
    tokenizer_sha256 = "1" * 64

    def __init__(self, variant: str, size: str):
        self.variant, self.size, self.model = variant, size, self

    def parameters(self) -> list[Any]:
        return []


def make_evaluation(variant: str = "ddl-cc", size: str = "small", **changes: Any) -> dict[str, Any]:
    """The summary that `ddl eval` would write, a few points off the paper's scores."""
    paper = {shots: paper_scores(variant, size, shots) for shots in (0, 1)}
    results = [
        {
            "task": name,
            "shots": shots,
            "examples": 1000,
            "acc": paper[shots].get(name, 30.0) / 100 - 0.02,
            "acc_stderr": 0.015,
            "acc_norm": paper[shots].get(name, 30.0) / 100 + 0.01,
            "acc_norm_stderr": 0.0151,
            "files_sha256": {"test.jsonl": "2" * 64},
            "rows_sha256": "3" * 64,
        }
        for shots in (0, 1)
        for name in TASKS
    ]
    loss = {
        "loss": {"mean": 2.9, "low": 2.85, "high": 2.96},
        "perplexity": {"mean": 18.2, "low": 17.3, "high": 19.3},
        "bits_per_byte": {"mean": 0.93, "low": 0.91, "high": 0.95},
        "documents": 509,
        "tokens": 1_004_278,
        "bytes": 4_540_000,
        "groups": 509,
        "grouped_by": "document",
        "level": 0.95,
    }
    context = {
        "command": "ddl eval <b>x --data data",
        "commit": None,
        "hardware": "a CPU",
        "versions": {"python": "3.11", "lm_eval": "0.4.13"},
        "settings": {"split": "val", "context": 1024, "limit": None, "task_data": None},
    }
    checkpoint: Any = Named(variant, size)
    return {**summarise(checkpoint, loss, results, context), **changes}
