"""Train one model by a recipe, and leave its run folder."""

import torch
import torch._dynamo  # else the first optimizer step loads it, in somebody's timing

from deep_delta.accounting import PeakMemory
from deep_delta.checkpoint import quiet_transformers
from deep_delta.model.flops import flops_per_token
from deep_delta.train.checkpoint import step_of
from deep_delta.train.devices import find_devices
from deep_delta.train.folder import (
    Diverged,
    Hold,
    RunFolder,
    RunResult,
    provenance,
)
from deep_delta.train.loop import Loop
from deep_delta.train.metrics import Metrics
from deep_delta.train.model import (
    build_model,
    cross_entropy,
    first_model,
    model_config,
    resolved,
)
from deep_delta.train.processes import (
    is_main,
    lost_processes_named,
    on_main,
    processes,
    wait_for_all,
)
from deep_delta.train.progress import ProgressLine
from deep_delta.train.recipe import Recipe
from deep_delta.train.stop import NotFinite, StopOnSignal
from deep_delta.train.texts import open_texts
from deep_delta.train.trackers import Trackers


class Interrupted(Exception):
    """The run was stopped by a signal (`signal`, its number) after saving a checkpoint."""

    def __init__(self, signal: int):
        super().__init__(f"stopped by signal {signal}")
        self.signal = signal


def train(recipe: Recipe) -> RunResult:
    """Train by the recipe, or take up the run in its folder; returns the result.

    Leaves recipe.yaml, data.json (the hashes of the data, and of the weights of `init`),
    weight_decay.json, metrics.jsonl, result.json and final/ (a checkpoint with tokenizer that
    `from_pretrained` loads) in `resolved(recipe).run_folder`, and what the trackers write there.
    Called in several processes (torchrun), all train the one model; the first writes the folder,
    which all must see, and all return its result.

    Raises:
        UserError: data, recipe, run folder or trackers that do not fit, in one line.
        Diverged: a loss or gradient was no number; result.json and diverged.json say where.
        Interrupted: after Ctrl-C, SIGTERM or SIGHUP; the same call goes on from the checkpoint.
        LostProcess: another process ended; the same call goes on from the newest checkpoint.
    """
    recipe = resolved(recipe)
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
    texts = open_texts(recipe, config.vocab_size)
    config.eos_token_id = texts.manifest.eot_id  # where generation is to stop
    initial = first_model(recipe, config, texts.train.shards)
    on_main(hold.take)
    folder = RunFolder(recipe)
    checkpoint = folder.prepare(config, texts)
    result = folder.finished()
    if result is not None:
        return result

    made_with = provenance()
    start = 0 if checkpoint is None else step_of(checkpoint) or 0
    progress = ProgressLine(f"{recipe.label} seed {recipe.seed}", recipe.steps, start)
    with PeakMemory() as memory:
        if recipe.compile:
            # Else the graphs of a comparison's earlier runs would be looked through at every call.
            torch.compiler.reset()
        model = build_model(recipe, config, devices.device, loss, checkpoint or initial)
        del initial  # a GPU needs its place
        folder.check_disk(model)
        folder.save_weight_decay(model)
        parameters = sum(p.numel() for p in model.parameters())  # shards have fewer
        cost = flops_per_token(config, recipe.seq_len)
        metrics = Metrics(
            folder.path / "metrics.jsonl",
            tokens_per_step=recipe.batch_size * recipe.seq_len,
            flops_per_token=cost,
            resumed_at=start,
            devices=processes(),
            memory=memory,
            progress=progress,
            also=trackers.log,
        )
        trackers.open(recipe, config, start)
        loop = Loop(recipe, devices, model, texts.train, texts.val, metrics)
        wait_for_all()  # out of memory in one process, say, ends all of them here
        if checkpoint is not None:
            loop.resume(checkpoint, start)
        diverged, stopped_by, test_loss = None, None, None
        try:
            stopped_by = loop.run(StopOnSignal())
            if texts.test is not None and loop.step == recipe.steps:
                test_loss = loop.evaluate(texts.test)
        except NotFinite as event:
            diverged = folder.save_divergence(event, texts.train)
        finally:
            devices.accelerator.free_memory()
    if stopped_by is not None and loop.step < recipe.steps:
        _finish(progress, f"interrupted at step {loop.step}, checkpoint saved")
        raise Interrupted(stopped_by)
    if diverged is None:
        folder.save_final(model, tokenizer=texts.folder)
    result = folder.save_result(
        parameters=parameters,
        flops_per_token=cost,
        peak_memory_bytes=memory.bytes,
        test_loss=test_loss,
        diverged=diverged,
        **made_with,
    )
    if diverged is not None:
        _finish(progress, "diverged")
        raise Diverged(diverged)
    _finish(progress, f"val loss {result.val_loss:.4f}  {result.tokens_per_s:,.0f} tokens/s")
    if stopped_by is not None:  # in the last step: complete, but nothing is to follow
        raise Interrupted(stopped_by)
    return result


def _finish(progress: ProgressLine, text: str) -> None:
    if is_main():
        progress.finish(text)
