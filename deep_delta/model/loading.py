"""Loading a checkpoint: every weight in it finds its place, and none is made up."""

from collections.abc import Collection
from typing import Any

from transformers import PreTrainedModel


class CompleteLoading(PreTrainedModel):
    """A model whose `from_pretrained` stops where transformers would only log.

    A config.json that was edited (fewer layers, no embedding convolution) does not fit the weights
    beside it: some would be dropped, others drawn at random, and the model would be another one.
    A head may differ where the checkpoint is of another class: the base model leaves it out, and a
    classifier starts with a new one.
    """

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs
    ) -> Any:
        """`PreTrainedModel.from_pretrained`, which see.

        With `output_loading_info` nothing is refused: the caller gets (model, what did not fit).
        Nor is a `state_dict` that comes without a path.

        Raises:
            ValueError: weights that the model has no place for, or lacks; one line.
        """
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        if output_loading_info:
            return loaded
        model, info = loaded
        if (path := pretrained_model_name_or_path) is not None:
            unused, lacking = info["unexpected_keys"], info["missing_keys"]
            _refuse(path, model, "holds {} weights that the model has no place for", unused)
            _refuse(path, model, "lacks {} of the model's weights", lacking)
        return model


def _refuse(path: Any, model: PreTrainedModel, what: str, keys: Collection[str]) -> None:
    """ValueError if any of `keys` matters to the model that was loaded from `path`."""
    same_class = type(model).__name__ in (model.config.architectures or ())
    matter = sorted(key for key in keys if same_class or _in_body(key, model))
    if not matter:
        return
    cure = "use the config.json that was saved with the weights"
    if hasattr(model, "peft_config"):  # transformers cannot load PEFT's `modules_to_save`
        cure = "load the adapter by PeftModel.from_pretrained"
    raise ValueError(
        f"{path} {what.format(len(matter))}, first {matter[0]}: {cure} (output_loading_info=True "
        "loads what fits)"
    )


def _in_body(key: str, model: PreTrainedModel) -> bool:
    """Whether a weight belongs to the decoder, with or without its prefix, and not to a head."""
    child = key.removeprefix(f"{model.base_model_prefix}.").partition(".")[0]
    return child in dict(model.base_model.named_children())
