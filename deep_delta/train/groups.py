"""AdamW's parameter groups: what decays, and what learns more slowly in a wider model (µP)."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from deep_delta.residual import ResidualModule


def decayed_names(model: nn.Module, decay_residual: bool = True) -> list[str]:
    """The tensors with weight decay: those of two or more dimensions.

    Without `decay_residual` not those of gates, targets, compressors and the embedding convolution.
    """
    spared = set()
    if not decay_residual:
        own = (module for module in model.modules() if isinstance(module, ResidualModule))
        spared = {id(parameter) for module in own for parameter in module.parameters()}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and id(parameter) not in spared
    ]


def width_scaled_names(model: PreTrainedModel) -> list[str]:
    """The matrices whose products sum over the width, none where the width ratio is 1.

    They are those of attention and MLP, and of the residuals those that read a whole vector of
    width d. The tied head is an embedding too: the factor on the logits is its share.
    """
    if model.config.width_ratio == 1:
        return []
    scaled = set()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            scaled.add(id(module.weight))
        elif isinstance(module, ResidualModule):
            scaled |= {id(getattr(module, name)) for name in module.reads_width}
    embeddings: Any = model.get_input_embeddings().weight
    return [
        name
        for name, parameter in model.named_parameters()
        if id(parameter) in scaled and parameter is not embeddings
    ]


def parameter_groups(
    model: PreTrainedModel, lr: float, weight_decay: float, decay_residual: bool = True
) -> list[dict[str, Any]]:
    """Groups for AdamW: with and without decay, and the same of `width_scaled_names`, if any.

    With m = `config.width_ratio` these learn at lr/m. AdamW takes lr·weight_decay off a weight, so
    that theirs is weight_decay·m: every tensor loses the same share in a step at every width. The
    first group always learns at lr itself, which is what metrics.jsonl has.
    """
    ratio = model.config.width_ratio
    decayed, scaled = set(decayed_names(model, decay_residual)), set(width_scaled_names(model))
    groups = []
    for slower in (False, True):
        factor = ratio if slower else 1.0
        for decays in (True, False):
            parameters = [
                parameter
                for name, parameter in model.named_parameters()
                if parameter.requires_grad
                and (name in scaled) == slower
                and (name in decayed) == decays
            ]
            if parameters or not slower:
                decay = weight_decay * factor if decays else 0.0
                groups.append({"params": parameters, "lr": lr / factor, "weight_decay": decay})
    return groups
