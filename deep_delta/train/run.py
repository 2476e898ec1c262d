"""Train one model by a recipe, and leave its run folder."""

from pathlib import Path

import torch
import torch._dynamo  # else the first optimizer step loads it, in somebody's timing
from safetensors.torch import load_model
from torch import nn
from transformers import set_seed
from transformers.utils import SAFE_WEIGHTS_NAME

from deep_delta.accounting import PeakMemory
from deep_delta.checkpoint import quiet_transformers
from deep_delta.data import Manifest, PackedSequences, TokenShards, check_tokenizer, prepare_bundled
from deep_delta.errors import UserError
from deep_delta.model import DeepDeltaConfig, DeepDeltaForCausalLM
from deep_delta.model.compile import compile_layers
from deep_delta.model.flops import flops_per_token
from deep_delta.model.loss import LinearCrossEntropy, resolve_loss
from deep_delta.train.checkpoint import step_of
from deep_delta.train.devices import find_devices
from deep_delta.train.folder import (
    FINAL,
    RESULT,
    Diverged,
    Hold,
    RunResult,
    check_disk,
    prepare_folder,
    provenance,
    read_result,
    save_divergence,
    save_final,
    save_result,
    save_weight_decay,
)
from deep_delta.train.loop import Loop
from deep_delta.train.metrics import Metrics
from deep_delta.train.processes import (
    is_main,
    lost_processes_named,
    on_each,
    on_main,
    processes,
    rank,
    wait_for_all,
)
from deep_delta.train.progress import ProgressLine
from deep_delta.train.recipe import Recipe
from deep_delta.train.stop import NotFinite, StopOnSignal
from deep_delta.train.trackers import Trackers


class Interrupted(Exception):
    """The run was stopped by Ctrl-C or SIGTERM (`signal`, its number) after saving a checkpoint."""

    def __init__(self, signal: int):
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


def train(recipe: Recipe) -> RunResult:
    """Train by the recipe, or take up the run in its folder; returns the result.

    Leaves recipe.yaml, data.json (the data's hashes), weight_decay.json, metrics.jsonl, result.json
    and final/ (a checkpoint with tokenizer that `from_pretrained` loads) in `recipe.run_folder`,
    and what the trackers write there. Called in several processes (torchrun), all train the one
    model; the first writes the folder, which all must see, and all return its result.

    Raises:
        UserError: data, recipe, run folder or trackers that do not fit, in one line.
        Diverged: a loss or gradient was no number; result.json and diverged.json say where.
        Interrupted: after Ctrl-C or SIGTERM; the same call goes on from the checkpoint.
        LostProcess: another process ended; the same call goes on from the newest checkpoint.
    """
    # Trackers close last, when all is saved: W&B waits for the network then, as long as it takes.
    with (
        lost_processes_named(),
        Trackers(recipe.tracker_names) as trackers,
        Hold(recipe.run_folder) as hold,
    ):
        return _train(recipe, trackers, hold)


def _train(recipe: Recipe, trackers: Trackers, hold: Hold) -> RunResult:
    quiet_transformers()
    config, devices = model_config(recipe), find_devices(recipe)
    loss = cross_entropy(recipe, devices.device)
    data_folder = on_main(lambda: find_data(recipe))
    train_data, val_data, manifest = _datasets(recipe, data_folder, config)
    on_main(hold.take)
    checkpoint = on_main(lambda: prepare_folder(recipe, config, manifest))
    folder, made_with = recipe.run_folder, on_main(provenance)
    result = on_main(lambda: read_result(folder) if (folder / RESULT).is_file() else None)
    if result is not None:
        if result.diverged:
            raise Diverged(result.diverged)
        return result

    with PeakMemory() as memory:
        start = 0 if checkpoint is None else step_of(checkpoint) or 0
        if recipe.compile:
            # Else the graphs of a comparison's earlier runs would be looked through at every call.
            torch.compiler.reset()
        model = build_model(recipe, config, devices.device, loss, checkpoint)
        on_main(lambda: check_disk(folder, model, recipe))
        parameters = sum(p.numel() for p in model.parameters())  # shards have fewer
        on_main(
            lambda: save_weight_decay(model, recipe.decay_residual, folder / "weight_decay.json")
        )
        progress = ProgressLine(f"{recipe.variant} seed {recipe.seed}", recipe.steps, start)
        metrics = Metrics(
            folder / "metrics.jsonl",
            tokens_per_step=recipe.batch_size * recipe.seq_len,
            flops_per_token=flops_per_token(config, recipe.seq_len),
            resumed_at=start,
            devices=processes(),
            memory=memory,
            progress=progress,
            also=trackers.log,
        )
        on_main(lambda: trackers.open(recipe, config, start))
        evaluated = list(range(min(recipe.eval_sequences or len(val_data), len(val_data))))
        loop = Loop(recipe, devices, model, train_data, val_data, evaluated, metrics, folder)
        wait_for_all()  # out of memory in one process, say, ends all of them here
        if checkpoint is not None:
            loop.resume(checkpoint, start)
        not_finite: NotFinite | None = None
        stopped_by = None
        try:
            stopped_by = loop.run(StopOnSignal())
        except NotFinite as event:
            not_finite = event
        finally:
            devices.accelerator.free_memory()
        if stopped_by is not None and loop.step < recipe.steps:
            _finish(progress, f"interrupted at step {loop.step}, checkpoint saved")
            raise Interrupted(stopped_by)
    if not_finite is not None:
        met, shards = not_finite, train_data.shards
        line = on_main(lambda: save_divergence(met, shards, recipe.seq_len, folder))
        on_main(
            lambda: save_result(
                recipe, config, parameters, folder, memory.bytes, made_with, diverged=line
            )
        )
        _finish(progress, "diverged")
        raise Diverged(line)
    save_final(model, data_folder, folder / FINAL)
    result = on_main(
        lambda: save_result(recipe, config, parameters, folder, memory.bytes, made_with)
    )
    val_loss = float("nan") if result.val_loss is None else result.val_loss
    _finish(progress, f"val loss {val_loss:.4f}  {result.tokens_per_s:,.0f} tokens/s")
    if stopped_by is not None:  # in the last step: complete, but nothing is to follow
        raise Interrupted(stopped_by)
    return result


def _finish(progress: ProgressLine, text: str) -> None:
    if is_main():
        progress.finish(text)


def build_model(
    recipe: Recipe,
    config: DeepDeltaConfig,
    device: torch.device,
    loss: LinearCrossEntropy,
    checkpoint: Path | None = None,
) -> DeepDeltaForCausalLM:
    """The model that is trained, on the device: by the recipe's seed, or of a checkpoint."""
    set_seed(recipe.seed)
    model = DeepDeltaForCausalLM(config)
    if checkpoint is not None:
        load_model(model, checkpoint / SAFE_WEIGHTS_NAME)
    nn.Module.to(model, device)  # else FSDP2 would do so only after the warm-up
    model.linear_cross_entropy = loss
    return compile_layers(model) if recipe.compile else model


def cross_entropy(recipe: Recipe, device: torch.device) -> LinearCrossEntropy:
    """The recipe's loss; its ValueErrors become UserErrors."""
    try:
        return resolve_loss(recipe.loss, device)
    except ValueError as error:
        raise UserError(str(error)) from None


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


def find_data(recipe: Recipe) -> Path:
    """The prepared data of a recipe; the bundled text is prepared in OUT/data."""
    if recipe.data == "bundled":
        return prepare_bundled(Path(recipe.out) / "data")
    return Path(recipe.data)


def _opened(folder: Path) -> list[TokenShards]:
    """Both splits, of whose shards every process reads its part: large data takes minutes."""
    splits = [TokenShards.open(folder, split, verify=False) for split in ("train", "val")]
    for shards in splits:
        shards.verify(rank(), processes())
    return splits


def _datasets(
    recipe: Recipe, folder: Path, config: DeepDeltaConfig
) -> tuple[PackedSequences, PackedSequences, Manifest]:
    train_shards, val_shards = on_each(lambda: _opened(folder))
    check_tokenizer(train_shards.manifest, config.vocab_size)
    config.eos_token_id = train_shards.manifest.eot_id  # where generation is to stop
    mask = recipe.mask_documents
    train_data = PackedSequences(train_shards, recipe.seq_len, mask_documents=mask)
    if len(train_data) < recipe.batch_size:
        raise UserError(
            f"{folder} has {len(train_data)} sequences of {recipe.seq_len} tokens, fewer than one "
            f"batch of {recipe.batch_size}"
        )
    val_data = PackedSequences(val_shards, recipe.seq_len, mask_documents=mask)
    return train_data, val_data, train_shards.manifest
