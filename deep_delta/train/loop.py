"""The training loop, on accelerate: accumulate, clip, update; evaluate, log, save and stop."""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deep_delta.data.shards import IGNORED_LABEL, PackedSequences, spread
from deep_delta.model import DeepDeltaForCausalLM
from deep_delta.model.capture import captured
from deep_delta.train.batches import Batch, Order, collate, predictions
from deep_delta.train.checkpoint import load_optimizer, save_checkpoint
from deep_delta.train.devices import Devices
from deep_delta.train.groups import parameter_groups
from deep_delta.train.metrics import Metrics
from deep_delta.train.processes import everyones, rank
from deep_delta.train.recipe import Recipe
from deep_delta.train.schedule import rate_factor
from deep_delta.train.stop import NotFinite, StopOnSignal
from deep_delta.train.watch import Watch

PASS = "the forward and backward pass (the first ones compile)"
GPU = "the GPU to finish what is queued"
OTHERS = "the other processes"


class Loop:
    """Training of one model by a recipe, from `step` on. `run` does all of it.

    A step's batch and randomness depend on seed and step alone, so that a resumed run skips
    nothing and any number of processes trains on the same sequences.

    Args:
        recipe: steps, batch, rates, intervals. Its run folder gets checkpoint-STEP at every
            `save_every`th step and when a signal stops the run.
        devices: what trains, and how a batch is shared.
        model: with its weights, on the device; compiled or not.
        data, validation: training data, and what is evaluated at every `eval_every`th step.
        metrics: takes a row for every log and evaluation.
    """

    def __init__(
        self,
        recipe: Recipe,
        devices: Devices,
        model: DeepDeltaForCausalLM,
        data: PackedSequences,
        validation: PackedSequences,
        metrics: Metrics,
    ):
        self.recipe, self.devices, self.bare = recipe, devices, model
        self.data, self.validation = data, validation
        self.metrics, self.watch, self.step = metrics, Watch(), 0
        self.order = Order(len(data), recipe.batch_size, recipe.seed)
        self.accelerator, self.autocast = devices.accelerator, devices.autocast
        if recipe.gradient_checkpointing:
            # Without dropout there is no state of a random generator to bring back.
            random = model.config.attention_dropout > 0
            options = {"use_reentrant": False, "preserve_rng_state": random}
            model.gradient_checkpointing_enable(options)
        self._warm_up()
        groups = parameter_groups(model, recipe.lr, recipe.weight_decay, recipe.decay_residual)
        self.peaks = [group["lr"] for group in groups]
        betas = (recipe.beta1, recipe.beta2)
        optimizer = torch.optim.AdamW(groups, betas=betas, fused=True)
        self.model: Any
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        devices.check_wrapper(self.model, recipe.parallel)
        self.one_pass: Callable[[Batch, Tensor], Tensor] = self.forward_backward
        # Since the last log. Looked at only there, since reading a loss waits for the GPU.
        self.passes: list[tuple[int, list[int], Tensor]] = []  # step, sequences, loss
        self.norms: list[tuple[int, Tensor]] = []

    def resume(self, checkpoint: Path, step: int) -> None:
        """Go on after a step, with the optimizer's state; the model has its weights already."""
        load_optimizer(self.bare, self.optimizer.optimizer, checkpoint)
        self.step = step

    def run(self, stop: StopOnSignal) -> int | None:
        """Train to the recipe's last step; the number of the signal that came, if one did.

        Raises:
            NotFinite: at the first log that meets a loss or gradient norm that is no number;
                nothing is saved then.
        """
        recipe = self.recipe
        with self.watch, stop:
            if recipe.cuda_graphs:
                self.capture()
            self.metrics.start_clock()
            while self.step < recipe.steps:
                rate, norm = self.train_step()
                self.watch.at(OTHERS)
                last = self.step == recipe.steps
                stopped = stop.agree() is not None and not last
                evaluates = last or (self.step % recipe.eval_every == 0 and not stopped)
                saves = stopped or (
                    recipe.save_every and (last or self.step % recipe.save_every == 0)
                )
                if evaluates or saves or self.step % recipe.log_every == 0:
                    self.log(rate, norm)
                if evaluates:
                    limit = recipe.eval_sequences
                    self.metrics.evaluated(self.step, self.evaluate(self.validation, limit))
                if saves:
                    self.save()
                if stopped:
                    break
            return stop.requested

    def train_step(self) -> tuple[float, Tensor]:
        """One update on the next batch; its learning rate and its gradients' norm."""
        recipe, devices = self.recipe, self.devices
        self.watch.begin(f"step {self.step + 1}", "its batch")
        # Attention's dropout, where there is one, is the step's own too.
        own = np.random.SeedSequence([recipe.seed, self.step, rank()])
        torch.manual_seed(int(own.generate_state(1, np.uint64)[0]))
        factor = rate_factor(recipe, self.step)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        shares = [self._share(self.order(self.step), number) for number in range(devices.passes)]
        batches = [collate(self.data, share, devices.device) for share in shares]
        count = sum(predictions(batch) for batch in batches)
        count = self.accelerator.gather(count).sum()
        self.watch.at(PASS)
        self.model.train()
        for number, (share, batch) in enumerate(zip(shares, batches, strict=True), 1):
            more = number < devices.passes
            with self.accelerator.no_sync(self.model) if more else contextlib.nullcontext():
                loss = self.one_pass(batch, count)
            self.passes.append((self.step + 1, share, loss))
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.norms.append((self.step + 1, norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not recipe.cuda_graphs)  # graphs add where they lie
        self.step += 1
        return self.peaks[0] * factor, norm

    def log(self, rate: float, norm: Tensor) -> None:
        """A row of the mean loss since the last one; NotFinite for what is no number."""
        self.watch.at(GPU)
        total = sum(
            (loss for _, _, loss in self.passes), torch.zeros((), device=self.devices.device)
        )
        steps = self.step - self.passes[0][0] + 1
        # A process's losses are of its own share, times the number of processes.
        loss = self.accelerator.gather(total).mean().item() / steps
        self.metrics.trained(self.step, loss, rate, norm.item())
        self._check_finite(loss)
        self.passes, self.norms = [], []

    @torch.no_grad()
    def evaluate(self, data: PackedSequences, limit: int | None = None) -> float:
        """Mean loss over all predictions of the data, nats, or of `limit` sequences of it.

        These are spread evenly, so that they come from as many documents as can be.
        """
        sequences = spread(len(data) if limit is None else limit, len(data))
        self.watch.begin(f"the evaluation at step {self.step}", GPU)
        self.model.eval()
        losses, counts = [], []
        size = self.devices.micro_batch * self.accelerator.num_processes
        for begin in range(0, len(sequences), size):
            # Every process makes the same passes of one shape: what is missing predicts nothing.
            chosen = sequences[begin : begin + size]
            padded = chosen + [chosen[0]] * (size - len(chosen))
            own = slice(rank() * self.devices.micro_batch, (rank() + 1) * self.devices.micro_batch)
            batch = collate(data, padded[own], self.devices.device)
            batch["labels"][max(0, len(chosen) - own.start) :] = IGNORED_LABEL
            counts.append(predictions(batch))
            losses.append(self._loss(batch, torch.ones((), device=self.devices.device)))
        totals = self.accelerator.gather(torch.stack([torch.stack(losses), torch.stack(counts)]))
        loss, count = totals.cpu().double().view(-1, 2, len(losses)).sum((0, 2)).tolist()
        self.metrics.start_clock()
        return loss / count

    def save(self) -> None:
        """Leave checkpoint-STEP, whole or not at all."""
        self.watch.begin(f"saving at step {self.step}", "the disk")
        self.metrics.flush()  # no checkpoint may outlive the rows before it
        optimizer, keep = self.optimizer.optimizer, self.recipe.keep_checkpoints
        save_checkpoint(self.recipe.run_folder, self.step, self.bare, optimizer, keep)
        self.metrics.start_clock()

    def _share(self, sequences: list[int], number: int) -> list[int]:
        """This process's sequences of a step in its pass of a number."""
        size = self.devices.micro_batch
        start = (number * self.accelerator.num_processes + rank()) * size
        return sequences[start : start + size]

    def _loss(self, batch: Batch, count: Tensor) -> Tensor:
        """The summed loss of a batch over the number of predictions that it is to be divided by."""
        with self.autocast():
            return self.model(
                **batch, num_items_in_batch=count, skip_logits=True, use_cache=False
            ).loss

    def forward_backward(self, batch: Batch, count: Tensor) -> Tensor:
        """Add a pass's share of the step's gradients; its share of the step's loss, detached."""
        loss = self._loss(batch, count) * self.accelerator.num_processes  # gradients are averaged
        self.accelerator.backward(loss)
        return loss.detach()

    def _warm_up(self) -> None:
        """One untimed pass: first calls load or compile, which the first run should not pay for."""
        self.model = self.bare.train()
        batch = collate(self.data, list(range(self.devices.micro_batch)), self.devices.device)
        self._loss(batch, predictions(batch)).backward()
        self.bare.zero_grad(set_to_none=True)

    def capture(self) -> None:
        """Make forward and backward a CUDA graph that adds to the gradients where they lie."""
        batch = collate(self.data, self._share(self.order(self.step), 0), self.devices.device)
        names = list(batch)
        self.forward_backward(batch, predictions(batch))  # the gradients get their places
        self.optimizer.zero_grad(set_to_none=False)

        def call(*tensors: Tensor) -> Tensor:
            return self.forward_backward(dict(zip(names, tensors[:-1], strict=True)), tensors[-1])

        replay = captured(call, *batch.values(), predictions(batch))
        self.optimizer.zero_grad(set_to_none=False)
        # The next replay overwrites the loss.
        self.one_pass = lambda batch, count: replay(*batch.values(), count).clone()

    def _check_finite(self, loss: float) -> None:
        norms = [(step, float(norm)) for step, norm in self.norms]
        if math.isfinite(loss) and all(math.isfinite(norm) for _, norm in norms):
            return
        own_bad = [step for step, _, loss in self.passes if not math.isfinite(loss.item())]
        bad = [step for steps in everyones(own_bad) for step in steps]
        what, value, step = "loss", loss, min(bad, default=self.step)
        steep = next(((at, norm) for at, norm in norms if not math.isfinite(norm)), None)
        if steep and (not bad or steep[0] < step):  # it spoilt the weights, and they the loss
            what, value, step = "gradient norm", steep[1], steep[0]
        own = [number for at, numbers, _ in self.passes if at == step for number in numbers]
        sequences = [number for numbers in everyones(own) for number in numbers]
        raise NotFinite(what, value, step, sequences)
