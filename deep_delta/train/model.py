"""The model of a recipe: its configuration, and the checkpoint whose weights it begins with."""

import dataclasses
from collections.abc import Container
from pathlib import Path

import torch
from safetensors.torch import load_model as load_weights
from torch import nn
from transformers import set_seed
from transformers.utils import SAFE_WEIGHTS_NAME

from deep_delta.checkpoint import check_fits, load_config, load_model
from deep_delta.data import TokenShards
from deep_delta.errors import UserError
from deep_delta.model import DeepDeltaConfig, DeepDeltaForCausalLM
from deep_delta.model.compile import compile_layers
from deep_delta.model.loss import LinearCrossEntropy, resolve_loss
from deep_delta.train.recipe import REORDERS_SUMS, Recipe

# Fields of the configuration that leave weights what they are.
MAY_CHANGE = {*REORDERS_SUMS, "state_dtype", "max_position_embeddings", "attention_dropout"}


def model_config(recipe: Recipe) -> DeepDeltaConfig:
    """The model's configuration; its ValueErrors become UserErrors."""
    try:
        config = DeepDeltaConfig.from_preset(
            recipe.variant,
            recipe.size,
            parameterization=recipe.parameterization,
            **recipe.model,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    if recipe.seq_len > config.max_position_embeddings:
        config.max_position_embeddings = recipe.seq_len
    return config


def resolved(recipe: Recipe, said: Container[str] = ()) -> Recipe:
    """The recipe with the model of its `init`; without `init` the recipe as it is.

    Variant, size and parameterization become the checkpoint's, and `model` says in what it differs
    from them, so that the recipe describes this model by itself. What is resolved stays as it is.

    Args:
        said: fields that the user named, and that are no defaults: they must be the checkpoint's.

    Errors: UserError for a folder that is no checkpoint, or that the run would write to, and for
        names in `said` and fields of `model` that contradict it.
    """
    if recipe.init is None:
        return recipe
    folder = Path(recipe.init)
    chosen = {name: value for name, value in recipe.model.items() if name in MAY_CHANGE}
    config = load_config(folder, **chosen)
    names, fields = config.as_preset()
    fields.pop("eos_token_id", None)  # the data's, see `run`
    found = dataclasses.replace(recipe, **names, model={**fields, **recipe.model})
    ours = model_config(found)
    others = {
        name: value
        for name, value in config.changes_from(ours).items()
        if name not in MAY_CHANGE | {"eos_token_id"}
    }
    wrong = [
        *(
            f"{name} is {own}, not {getattr(recipe, name)}"
            for name, own in names.items()
            if name in said and getattr(recipe, name) != own
        ),
        *(f"{name} is {own}, not {getattr(ours, name)}" for name, own in others.items()),
    ]
    if wrong:
        raise UserError(
            f"--init takes the model of {folder}, whose {' and '.join(wrong)}: leave that out "
            f"(only {', '.join(sorted(MAY_CHANGE))} may change)"
        )
    if found.run_folder.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise UserError(
            f"{folder} lies in {found.run_folder}, the folder of this run: choose another --out"
        )
    return found


def cross_entropy(recipe: Recipe, device: torch.device) -> LinearCrossEntropy:
    """The recipe's loss; its ValueErrors become UserErrors."""
    try:
        return resolve_loss(recipe.loss, device)
    except ValueError as error:
        raise UserError(str(error)) from None


def build_model(
    recipe: Recipe,
    config: DeepDeltaConfig,
    device: torch.device,
    loss: LinearCrossEntropy,
    begin: Path | DeepDeltaForCausalLM | None = None,
) -> DeepDeltaForCausalLM:
    """The model that is trained, on the device, with its loss, its layers compiled or not.

    begin: a checkpoint or a model with the weights to begin with; by default the seed makes them.
    """
    set_seed(recipe.seed)
    model = DeepDeltaForCausalLM(config)
    if isinstance(begin, Path):
        load_weights(model, begin / SAFE_WEIGHTS_NAME)
    elif begin is not None:
        model.load_state_dict(begin.state_dict())
    nn.Module.to(model, device)  # else FSDP2 would do so only after the warm-up
    model.linear_cross_entropy = loss
    return compile_layers(model) if recipe.compile else model


def first_model(
    recipe: Recipe, config: DeepDeltaConfig, shards: TokenShards
) -> DeepDeltaForCausalLM | None:
    """The model of `init`, in fp32 and evaluation mode; None without `init`.

    UserError if its weights can't be loaded, or if the data have another tokenizer.
    """
    if recipe.init is None:
        return None
    folder = Path(recipe.init)
    chosen = {name: getattr(config, name) for name in MAY_CHANGE}
    model = load_model(folder, dtype=torch.float32, **chosen)
    check_fits(folder, model, shards)
    return model
