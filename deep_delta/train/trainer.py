"""Hugging Face's Trainer with what this library does differently, and its settings."""

import os
import signal
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from deep_delta.data.shards import IGNORED_LABEL
from deep_delta.errors import UserError
from deep_delta.residual import ResidualModule
from deep_delta.train.recipe import Recipe


class DeltaTrainer(Trainer):
    """Trainer with the paper's weight decay and an exact validation loss.

    Weight decay is on every tensor of two or more dimensions.
    """

    def __init__(self, recipe: Recipe, eval_dataset: Subset, **kwargs):
        self.decay_residual = recipe.decay_residual
        super().__init__(eval_dataset=eval_dataset, **kwargs)
        sequences = range(len(eval_dataset))
        labels = (eval_dataset[index]["labels"][1:] for index in sequences)
        predictions = sum(int((row != IGNORED_LABEL).sum()) for row in labels)
        self.predictions_per_sequence = predictions / len(sequences)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean over predictions, also where documents are masked and batches differ in them.

        Trainer averages an evaluation's batch losses by sequences. Dividing each batch's sum by
        its sequences times the predictions of an average one makes that the mean over predictions.
        """
        inputs = {**inputs, "skip_logits": True}
        if model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        items = len(inputs["labels"]) * self.predictions_per_sequence
        outputs = model(**inputs, num_items_in_batch=items)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

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


def training_arguments(recipe: Recipe) -> TrainingArguments:
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
    # One process drives one GPU. Where it sees more, Trainer would split batches over all of them.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def warm_up(trainer: Trainer, model: nn.Module, data: Subset) -> None:
    """One untimed pass: first calls load or compile, and whoever trains first should not pay."""
    batch = [data[index] for index in range(trainer.args.per_device_train_batch_size)]
    inputs = trainer._prepare_inputs(default_data_collator(batch))
    predictions = (inputs["labels"] != IGNORED_LABEL).sum()
    with trainer.accelerator.autocast():  # as in training: what it loads and compiles depends on it
        loss = trainer.compute_loss(model, inputs, num_items_in_batch=predictions)
    loss.backward()  # type: ignore[union-attr]  # without outputs it is the loss alone
    model.zero_grad(set_to_none=True)
