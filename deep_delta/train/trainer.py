"""Hugging Face's Trainer with what this library does differently, and its settings."""

import errno
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any, cast

import accelerate
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers import trainer as hf_trainer

from deep_delta.data.shards import IGNORED_LABEL, PackedSequences
from deep_delta.errors import UserError
from deep_delta.model.flops import flops_per_token
from deep_delta.train.checkpoint import (
    OPTIMIZER,
    PREFIX_CHECKPOINT_DIR,
    SCHEDULER,
    STAGE,
    load_optimizer,
    publish,
    save_optimizer,
)
from deep_delta.train.groups import decayed_names, parameter_groups
from deep_delta.train.processes import (
    Agreement,
    everyones,
    is_main,
    on_main,
    processes,
    wait_for_all,
)
from deep_delta.train.recipe import Recipe

SEQUENCE = "sequence"  # which one of the data an item is: not for the model


class NumberedSequences(Dataset[dict[str, Tensor]]):
    """The first `count` items of a data set, each with its index as "sequence"."""

    def __init__(self, data: PackedSequences, count: int):
        self.data, self.count = data, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**self.data[index], SEQUENCE: torch.tensor(index)}


class WholeBatches(Dataset[dict[str, Tensor]]):
    """The data, then items without labels up to a multiple of `size`.

    Several processes must evaluate equally many items; without these, accelerate would repeat some
    and leave others out of the mean.
    """

    def __init__(self, data: Subset, size: int):
        self.data, self.size = data, size

    def __len__(self) -> int:
        return math.ceil(len(self.data) / self.size) * self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index < len(self.data):
            return self.data[index]
        item = self.data[0]
        return {**item, "labels": torch.full_like(item["labels"], IGNORED_LABEL)}


def skip_first_batches(loader: DataLoader, batches: int) -> DataLoader:
    """The loader without its first batches, and as prompt as it was.

    accelerate's own forgets that copies to the GPU need not be waited for: a resumed run then took
    12 % longer for a step, up to the end of the epoch.
    """
    rest = accelerate.skip_first_batches(loader, batches)
    rest._non_blocking = getattr(loader, "_non_blocking", False)
    return rest


class NotFinite(Exception):
    """A loss or gradient norm that is no number: what, at which step, on which sequences."""

    def __init__(self, what: str, value: float, step: int, sequences: list[int]):
        super().__init__(f"the {what} is {value} at step {step}")
        self.what, self.value, self.step, self.sequences = what, value, step, sequences


class DeltaTrainer(Trainer):
    """Trainer with our parameter groups, an exact validation loss and whole checkpoints.

    `parameter_groups` says what decays and how fast it learns. Training stops with `NotFinite` at
    the first log that meets a loss or gradient norm that is no number, and nothing is saved then.
    Checkpoints hold whole tensors, so that any number of processes can go on from them. The model
    comes with a checkpoint's weights; the trainer loads the rest.
    """

    def __init__(self, recipe: Recipe, args: TrainingArguments, eval_dataset: Any, **kwargs):
        self.decay_residual, self.keep_checkpoints = recipe.decay_residual, recipe.keep_checkpoints
        self.parallel = recipe.parallel
        # Step, sequences and loss of every pass since the last log: looked at only there, since
        # reading a loss waits for the GPU.
        self.passes: list[tuple[int, Tensor, Tensor]] = []
        self.norms: list[tuple[int, Any]] = []  # step and gradient norm, likewise
        self.staging = False
        if processes() > 1:
            size = args.per_device_eval_batch_size * processes()
            eval_dataset = WholeBatches(eval_dataset, size)
        super().__init__(args=args, eval_dataset=eval_dataset, **kwargs)
        sequences = range(len(eval_dataset))
        labels = (eval_dataset[index]["labels"][1:] for index in sequences)
        predictions = sum(int((row != IGNORED_LABEL).sum()) for row in labels)
        self.predictions_per_sequence = predictions / len(sequences)

    def _prepare_for_training(self, *arguments: Any) -> Any:
        """As Trainer's, and check that what the recipe asks for is what wraps the model."""
        prepared = super()._prepare_for_training(*arguments)
        wrapper = {"ddp": DistributedDataParallel, "fsdp2": FSDPModule}[self.parallel]
        if processes() > 1 and not isinstance(prepared[0], wrapper):
            raise UserError(
                f"the recipe says parallel: {self.parallel}, but the model is wrapped in "
                f"{type(prepared[0]).__name__}: check the launcher's own settings"
            )
        return prepared

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean over predictions, also where documents are masked and batches differ in them.

        Trainer averages an evaluation's batch losses by sequences. Dividing each batch's sum by
        its sequences times the predictions of an average one makes that the mean over predictions.
        """
        inputs = {name: value for name, value in inputs.items() if name != SEQUENCE}
        inputs["skip_logits"] = True
        with self.accelerator.autocast():  # which accelerate does by itself, but for FSDP2
            if model.training:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            items = len(inputs["labels"]) * self.predictions_per_sequence
            outputs = model(**inputs, num_items_in_batch=items)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        sequences = inputs[SEQUENCE]
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.passes.append((self.state.global_step + 1, sequences, loss))
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.norms.append((self.state.global_step + 1, norm))
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if "loss" not in logs:
            return
        passes, self.passes = self.passes, []
        norms, self.norms = self.norms, []
        if math.isfinite(logs["loss"]) and math.isfinite(logs.get("grad_norm", 0.0)):
            return
        own_bad = [step for step, _, loss in passes if not math.isfinite(loss.item())]
        bad = [step for steps in everyones(own_bad) for step in steps]
        what, value, step = "loss", logs["loss"], min(bad, default=self.state.global_step)
        steep = next(((at, norm) for at, norm in norms if not math.isfinite(norm)), None)
        if steep and (not bad or steep[0] < step):  # it spoilt the weights, and they the loss
            what, value, step = "gradient norm", float(steep[1]), steep[0]
        own = [number for at, numbers, _ in passes if at == step for number in numbers.tolist()]
        sequences = [number for numbers in everyones(own) for number in numbers]
        raise NotFinite(what, value, step, sequences)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As in metrics.jsonl. Trainer's estimate counts the model's parameters in every pass."""
        ids, model = inputs["input_ids"], cast(PreTrainedModel, self.model)
        return int(ids.numel() * flops_per_token(model.config, ids.shape[1]))

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGE) if self.staging else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer's, but whole or not at all; on an error what is there already stays."""
        stage = Path(self.args.output_dir or ".", STAGE)
        self.staging = True
        try:
            super()._save_checkpoint(model, trial)
            staged = stage / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            wait_for_all()  # every process has a file in it
            on_main(lambda: publish(staged, stage.parent, self.keep_checkpoints))
        except RuntimeError as error:
            if "inline_container" not in str(error):
                raise
            # torch's writer of zip files says where it broke off, and not that the disk is full.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(stage)) from error
        finally:
            self.staging = False
            if is_main():
                shutil.rmtree(stage, ignore_errors=True)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None):
        if state_dict is not None:  # gathered from shards, where a tied tensor comes twice
            tied = getattr(self.model, "all_tied_weights_keys", {})
            state_dict = {name: t for name, t in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder, schedule = Path(output_dir), self.lr_scheduler
        save_optimizer(*self._trained, folder / OPTIMIZER if is_main() else None)
        if is_main() and schedule is not None:
            torch.save(schedule.state_dict(), folder / SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The optimizer's moments and the schedule's place; rates and decay are the recipe's."""
        schedule: Any = self.lr_scheduler
        if checkpoint is None:
            return
        load_optimizer(*self._trained, Path(checkpoint, OPTIMIZER))
        saved = torch.load(Path(checkpoint, SCHEDULER), weights_only=True)
        own = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        rates = [rate * shape(saved["last_epoch"]) for rate, shape in own]
        # The place alone: decay_residual may have made other groups, which have their own lists.
        place = {name: saved[name] for name in ("last_epoch", "_step_count")}
        schedule.load_state_dict({**schedule.state_dict(), **place, "_last_lr": rates})
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _load_from_checkpoint(self, *arguments: Any) -> None:
        """Nothing: the model came with the checkpoint's weights."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        wait_for_all()  # each reads a file of its own: if one fails, all learn it here

    def _run_epoch(self, *arguments: Any, **named: Any) -> None:
        """As Trainer's, which takes up an epoch in its middle by accelerate's function."""
        theirs = hf_trainer.skip_first_batches
        hf_trainer.skip_first_batches = skip_first_batches
        try:
            super()._run_epoch(*arguments, **named)
        finally:
            hf_trainer.skip_first_batches = theirs

    @property
    def _trained(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model, as it is sharded, and the optimizer without accelerate's wrapper."""
        model, optimizer = self.model, getattr(self.optimizer, "optimizer", self.optimizer)
        assert isinstance(model, nn.Module)
        assert isinstance(optimizer, torch.optim.Optimizer)
        return model, optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decayed_names(model, self.decay_residual)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            rate, decay = self.args.learning_rate, self.args.weight_decay
            groups = parameter_groups(model, rate, decay, self.decay_residual)
            optimizer, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer(groups, **options)
        return self.optimizer


class StopOnSignal(TrainerCallback):
    """Ctrl-C or SIGTERM, in any process, ends the run after the current step, with a checkpoint.

    `requested` is then the signal's number, else None. Ctrl-C after that ends the run at once;
    another SIGTERM, which schedulers like to repeat, changes nothing.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._agreement = Agreement()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if exc[0] not in (None, NotFinite) and processes() > 1:
            # This process ends and says why. So does torchrun end it, whose signal may come first.
            # After NotFinite, which all meet, a comparison goes on.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _stop(self, number: int, *_: object) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = self.requested or number

    def agree(self) -> int | None:
        """`requested`, the same in all processes from here on."""
        self.requested = self._agreement.highest(self.requested or 0) or None
        return self.requested

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self.agree() is not None and state.global_step < state.max_steps:
            control.should_save = control.should_log = control.should_training_stop = True


def can_shard(devices: int) -> bool:
    """Whether FSDP2 can run; on CPUs accelerate would silently take DDP instead."""
    return devices > 1 and torch.cuda.is_available()


def training_arguments(recipe: Recipe) -> TrainingArguments:
    devices = max(1, int(os.environ.get("WORLD_SIZE", "1")))
    sharded = recipe.parallel == "fsdp2"
    if sharded and not can_shard(devices):
        raise UserError(
            "parallel: fsdp2 needs several processes, which torchrun starts, and a GPU for each: "
            "else set parallel to ddp"
        )
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
    arguments = TrainingArguments(
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
        use_cpu=not torch.accelerator.is_available(),
        seed=recipe.seed,
        data_seed=recipe.seed,
        dataloader_pin_memory=cuda,
        accelerator_config={"non_blocking": cuda},  # else a batch waits for all work before it
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=recipe.eval_every,
        prediction_loss_only=True,
        save_strategy="steps" if recipe.save_every else "no",
        save_steps=recipe.save_every or recipe.steps,
        remove_unused_columns=False,  # the number of a sequence is for the trainer
        ddp_find_unused_parameters=False,
        fsdp=sharded,  # type: ignore[arg-type]  # True is what it asks for
        disable_tqdm=True,
        report_to="none",
    )
    if sharded:
        # Parameters stay fp32 where they are computed with, and autocast decides as ever: rounding
        # them all would also round gates, norms and the gradients' sums.
        arguments.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy()
    # One process drives one GPU. Where it sees more, Trainer would split batches over all of them.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def warm_up(trainer: Trainer, model: nn.Module, data: NumberedSequences) -> None:
    """One untimed pass: first calls load or compile, and whoever trains first should not pay."""
    batch = [data[index] for index in range(trainer.args.per_device_train_batch_size)]
    inputs = trainer._prepare_inputs(default_data_collator(batch))
    predictions = (inputs["labels"] != IGNORED_LABEL).sum()
    with trainer.accelerator.autocast():  # as in training: what it loads and compiles depends on it
        loss = trainer.compute_loss(model, inputs, num_items_in_batch=predictions)
    loss.backward()  # type: ignore[union-attr]  # without outputs it is the loss alone
    model.zero_grad(set_to_none=True)
