"""Train one model by a recipe, on Hugging Face's Trainer."""

import json
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first optimizer step would load it, seconds in somebody's timing
from torch import nn
from torch.utils.data import Dataset, Subset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from deep_delta.accounting import PeakMemory, flops_per_token
from deep_delta.data import PackedSequences, TokenShards, check_tokenizer, prepare_bundled
from deep_delta.errors import UserError
from deep_delta.model import DeepDeltaConfig, DeepDeltaForCausalLM
from deep_delta.residual import ResidualModule
from deep_delta.train.metrics import MetricsWriter, read_metrics
from deep_delta.train.progress import ProgressLine
from deep_delta.train.recipe import Recipe, load_recipe, save_recipe

FINAL, RESULT, RECIPE = "final", "result.json", "recipe.yaml"


@dataclass
class RunResult:
    """What a finished run leaves in result.json.

    val_loss: nats per token at the last step. train_seconds: without evaluation and saving.
    tokens_per_s: tokens / train_seconds without the first logged interval, which warms up.
    peak_memory_bytes: highest use of the device's memory by the run (of the process on a CPU).
    flops_per_token: forward and backward.
    """

    variant: str
    seed: int
    parameters: int
    val_loss: float | None
    tokens: int
    train_seconds: float
    tokens_per_s: float
    peak_memory_bytes: int
    flops_per_token: float


class Interrupted(Exception):
    """The run was stopped by Ctrl-C after saving a checkpoint."""


def train(recipe: Recipe) -> RunResult:
    """Train by the recipe, or take up the run in its folder; returns the result.

    Leaves recipe.yaml, weight_decay.json, metrics.jsonl, result.json and final/ (a checkpoint with
    tokenizer that `from_pretrained` loads) in `recipe.run_folder`.

    Raises:
        UserError: data, recipe or run folder that do not fit, in one line.
        Interrupted: after Ctrl-C; the same call goes on from the checkpoint.
    """
    _quiet_transformers()
    config = model_config(recipe)
    data_folder = _data_folder(recipe)
    train_data, val_data = _datasets(recipe, data_folder, config)
    checkpoint = _prepare_folder(recipe)
    folder = recipe.run_folder
    if (folder / RESULT).is_file():
        return read_result(folder)

    with PeakMemory() as memory:
        set_seed(recipe.seed)
        model = DeepDeltaForCausalLM(config)
        _check_disk(folder, model, recipe)
        trainer = DeltaTrainer(
            recipe,
            model=model,
            args=_arguments(recipe),
            train_dataset=train_data,
            eval_dataset=val_data,
        )
        start = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        progress = ProgressLine(f"{recipe.variant} seed {recipe.seed}", recipe.steps, start)
        per_step = recipe.batch_size * recipe.seq_len
        writer = MetricsWriter(folder / "metrics.jsonl", per_step, start, progress)
        stopper = StopOnSignal()
        trainer.remove_callback(PrinterCallback)  # the progress line says it
        trainer.add_callback(writer)
        trainer.add_callback(stopper)
        _save_weight_decay(trainer, model, folder / "weight_decay.json")
        _warm_up(trainer, model, train_data)
        with stopper:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if stopper.requested and trainer.state.global_step < recipe.steps:
            progress.finish(f"interrupted at step {trainer.state.global_step}, checkpoint saved")
            raise Interrupted
    _save_final(trainer, model, data_folder, folder / FINAL)
    result = _result(recipe, config, model, folder, memory.bytes)
    progress.finish(
        f"val loss {float('nan') if result.val_loss is None else result.val_loss:.4f}  "
        f"{result.tokens_per_s:,.0f} tokens/s"
    )
    return result


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


class DeltaTrainer(Trainer):
    """Trainer with the paper's weight decay: on every tensor of two or more dimensions."""

    def __init__(self, recipe: Recipe, **kwargs):
        self.decay_residual = recipe.decay_residual
        super().__init__(**kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        residual = (
            set()
            if self.decay_residual
            else {
                id(parameter)
                for module in model.modules()
                if isinstance(module, ResidualModule)
                for parameter in module.parameters()
            }
        )
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim >= 2 and id(parameter) not in residual
        ]


def _warm_up(trainer: Trainer, model: nn.Module, data: Dataset) -> None:
    """One untimed pass: first calls load kernels, and whoever trains first should not pay."""
    batch = [data[index] for index in range(trainer.args.per_device_train_batch_size)]
    inputs = trainer._prepare_inputs(default_data_collator(batch))
    with trainer.compute_loss_context_manager():
        loss = model(**inputs).loss
    loss.backward()
    model.zero_grad(set_to_none=True)


def _save_weight_decay(trainer: DeltaTrainer, model: nn.Module, path: Path) -> None:
    """List the tensors with and without weight decay, with their shapes."""
    decayed = set(trainer.get_decay_parameter_names(model))
    listing: dict[str, dict[str, list[int]]] = {"decayed": {}, "not_decayed": {}}
    for name, parameter in model.named_parameters():
        kind = "decayed" if name in decayed else "not_decayed"
        listing[kind][name] = list(parameter.shape)
    path.write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")


class StopOnSignal(TrainerCallback):
    """Ctrl-C ends the run after the current step, with a checkpoint; a second one ends it now."""

    def __init__(self) -> None:
        self.requested = False
        self._before: Any = None

    def __enter__(self) -> "StopOnSignal":
        self._before = signal.signal(signal.SIGINT, self._stop)
        return self

    def __exit__(self, *exc: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _stop(self, *_: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.requested and state.global_step < state.max_steps:
            control.should_save = control.should_log = control.should_training_stop = True


def read_result(folder: Path) -> RunResult:
    return RunResult(**json.loads((folder / RESULT).read_text(encoding="utf-8")))


def _arguments(recipe: Recipe) -> TrainingArguments:
    devices = max(1, int(os.environ.get("WORLD_SIZE", "1")))
    per_device = recipe.micro_batch_size or recipe.batch_size // devices
    passes, rest = divmod(recipe.batch_size, per_device * devices) if per_device else (0, 1)
    if rest or not passes:
        raise UserError(
            f"batch_size {recipe.batch_size} is not a multiple of micro_batch_size {per_device} "
            f"times {devices} device(s)"
        )
    cuda = torch.cuda.is_available()
    bf16 = recipe.precision == "bf16" or (
        recipe.precision == "auto" and cuda and torch.cuda.is_bf16_supported()
    )
    return TrainingArguments(
        output_dir=str(recipe.run_folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=per_device,
        per_device_eval_batch_size=per_device,
        gradient_accumulation_steps=passes,
        gradient_checkpointing=recipe.gradient_checkpointing,
        learning_rate=recipe.lr,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.min_lr_ratio},
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.beta1,
        adam_beta2=recipe.beta2,
        max_grad_norm=recipe.clip,
        bf16=bf16,
        seed=recipe.seed,
        data_seed=recipe.seed,
        dataloader_drop_last=True,
        dataloader_pin_memory=cuda,
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=recipe.eval_every,
        prediction_loss_only=True,
        save_strategy="steps" if recipe.save_every else "no",
        save_steps=recipe.save_every or recipe.steps,
        save_total_limit=recipe.keep_checkpoints,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to="none",
    )


def _data_folder(recipe: Recipe) -> Path:
    if recipe.data == "bundled":
        return prepare_bundled(Path(recipe.out) / "data")
    return Path(recipe.data)


def _datasets(recipe: Recipe, folder: Path, config: DeepDeltaConfig) -> tuple[Dataset, Dataset]:
    train_shards, val_shards = (TokenShards.open(folder, split) for split in ("train", "val"))
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
    limit = min(recipe.eval_sequences or len(val_data), len(val_data))
    return train_data, Subset(val_data, range(limit))


def _prepare_folder(recipe: Recipe) -> Path | None:
    """Make the run folder; the checkpoint to go on from, or None. UserError for another run's."""
    folder = recipe.run_folder
    if recipe.resume == "never" and folder.exists():
        number = 1
        while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
            number += 1
        folder.rename(aside)  # nothing is lost by starting over
    checkpoint = None
    if recipe.resume not in ("auto", "never"):
        checkpoint = Path(recipe.resume)
        if not (checkpoint / "trainer_state.json").is_file():
            raise UserError(
                f"{checkpoint} is not a checkpoint folder: it has no trainer_state.json"
            )
        if not checkpoint.name.rpartition("-")[2].isdigit():
            raise UserError(f"{checkpoint} is not named checkpoint-STEP")
    before = folder / RECIPE
    if before.is_file() and (changed := recipe.differences(load_recipe(before))):
        raise UserError(
            f"{folder} holds a run of another recipe ({'; '.join(changed)}): choose another out, "
            "or resume=never to start over"
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, before)
    if checkpoint is None:
        complete = [c for c in folder.glob("checkpoint-*") if (c / "trainer_state.json").is_file()]
        checkpoint = max(complete, key=lambda c: int(c.name.rpartition("-")[2]), default=None)
    return checkpoint


def _check_disk(folder: Path, model: nn.Module, recipe: Recipe) -> None:
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    checkpoints = recipe.keep_checkpoints + 1 if recipe.save_every else 0
    needed = weights * (1 + 3 * checkpoints)  # a checkpoint holds two moments beside the weights
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 2**20:,.0f} MiB free, the run needs about "
            f"{needed / 2**20:,.0f} MiB: make room or choose another out"
        )


def _save_final(
    trainer: Trainer, model: DeepDeltaForCausalLM, data_folder: Path, final: Path
) -> None:
    """Weights, configuration and tokenizer, complete or not there at all."""
    temporary = final.with_name(final.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.config.use_cache = True  # Trainer switches it off, but the model is to be used now
    trainer.save_model(str(temporary))
    if not trainer.is_world_process_zero():
        return
    (temporary / "training_args.bin").unlink(missing_ok=True)  # a pickle; the recipe says it all
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(data_folder / name, temporary / name)
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)


def _result(
    recipe: Recipe, config: DeepDeltaConfig, model: nn.Module, folder: Path, memory: int
) -> RunResult:
    rows = read_metrics(folder / "metrics.jsonl")
    logged = [row for row in rows if "loss" in row]
    evaluated = [row for row in rows if "val_loss" in row]
    # The first interval pays for first calls; a run of one interval has nothing else.
    first = logged[0] if len(logged) > 1 else {"tokens": 0, "seconds": 0.0}
    last = logged[-1]
    result = RunResult(
        variant=recipe.variant,
        seed=recipe.seed,
        parameters=sum(p.numel() for p in model.parameters()),
        val_loss=evaluated[-1]["val_loss"],
        tokens=last["tokens"],
        train_seconds=last["seconds"],
        tokens_per_s=(last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"]),
        peak_memory_bytes=memory,
        flops_per_token=flops_per_token(config, recipe.seq_len),
    )
    temporary = folder / (RESULT + ".tmp")
    temporary.write_text(json.dumps(result.__dict__, indent=1) + "\n", encoding="utf-8")
    temporary.rename(folder / RESULT)
    return result


def _quiet_transformers() -> None:
    """One progress line a run is enough: no bars and no advice in between."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
