"""`ddl audit`: one checkpoint, or two on the same tokens, on real text."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deep_delta.audit import inputs
from deep_delta.audit.auditor import TOLERANCE, Auditor
from deep_delta.audit.streams import LEVEL, Means
from deep_delta.audit.sublayer import BORDERS, GATE_BINS, GATE_TOP, REGIMES
from deep_delta.checkpoint import check_fits, quiet_transformers
from deep_delta.data import PackedSequences
from deep_delta.data.files import write_json_atomically
from deep_delta.data.shards import spread
from deep_delta.errors import UserError
from deep_delta.model.presets import variant_of
from deep_delta.report.audit import write_audit

JSON_NAME = "audit.json"


def audit(
    checkpoints: Sequence[Path],
    out: Path,
    *,
    data: str = "bundled",
    sequences: int = 32,
    seq_len: int | None = None,
    batch_size: int = 4,
    context: Mapping[str, str],
) -> dict[str, Any]:
    """Audit one checkpoint or two, write OUT/audit.json, OUT/audit.html and its plots.

    Memory depends on the models, the batch and the sequence, not on how many sequences there are.

    Args:
        checkpoints: one or two folders that `from_pretrained` loads.
        data: a folder of `ddl prepare`, of which the validation split is read, or "bundled".
        sequences: how many, evenly spread over the split; all where there are fewer.
        seq_len: tokens of a sequence; by default what the first checkpoint was trained on.
        batch_size: sequences of a forward pass.
        context: what the report says about where and how it was measured.

    Returns:
        What audit.json holds; docs/audit.md explains it.

    Raises:
        UserError: checkpoints, text or tokenizers that do not fit; a failed self-test.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    quiet_transformers()
    models = [inputs.load(path) for path in checkpoints]
    trained, masked = inputs.trained_on(checkpoints[0], models[0])
    seq_len = seq_len or trained
    for path, model in zip(checkpoints, models, strict=True):
        longest = model.config.max_position_embeddings
        if seq_len > longest:
            raise UserError(f"{path} takes {longest} tokens, fewer than --seq-len {seq_len}")
    shards = inputs.open_text(data, out)
    for path, model in zip(checkpoints, models, strict=True):
        check_fits(path, model, shards)
    packed = PackedSequences(shards, seq_len, mask_documents=masked)
    chosen = spread(sequences, len(packed))
    count = len(chosen)
    position_labels, positions = inputs.position_bins(seq_len)
    vocabulary = max(model.config.vocab_size for model in models)
    frequency_labels, frequencies = inputs.frequency_bins(shards, vocabulary)
    auditors = [
        Auditor(
            name,
            model,
            (positions, len(position_labels)),
            (frequencies, len(frequency_labels)),
        )
        for name, model in zip(_names(checkpoints, models), models, strict=True)
    ]
    out.mkdir(parents=True, exist_ok=True)  # now, for what cannot be written ends here at once
    difference = _run(auditors, packed, chosen, batch_size)
    results = [auditor.result() for auditor in auditors]
    for result, path in zip(results, checkpoints, strict=True):
        result["path"] = str(path)
    summary: dict[str, Any] = {
        "schema": 1,
        **context,
        "data": {
            "folder": data,
            "split": inputs.SPLIT,
            "tokenizer": shards.manifest.tokenizer_name,
            "shards": [asdict(shard) for shard in shards.manifest.splits[inputs.SPLIT].shards],
            "sequences": count,
            "of_sequences": len(packed),
            "seq_len": seq_len,
            "tokens": count * seq_len,
            "documents_apart": masked,
        },
        "level": LEVEL,
        "tolerance": TOLERANCE,
        "regimes": {"names": REGIMES, "borders": BORDERS},
        "gate_bins": {"count": GATE_BINS, "top": GATE_TOP},
        "positions": position_labels,
        "frequencies": frequency_labels,
        "checkpoints": results,
        "loss_difference": None if difference is None else difference.entry(),
    }
    write_audit(summary, out)
    write_json_atomically(out / JSON_NAME, summary)
    return summary


def _run(
    auditors: Sequence[Auditor], packed: PackedSequences, chosen: Sequence[int], batch_size: int
) -> Means | None:
    """Every batch through every model, as it is and changed; the second's loss less the first's."""
    device = auditors[0].model.device
    progress = Progress(-(-len(chosen) // batch_size))
    difference = Means(device=device) if len(auditors) > 1 else None
    for batch in _batches(packed, chosen, batch_size, device):
        losses = [auditor.observe(batch) for auditor in auditors]
        if difference is not None:
            difference.add(losses[1] - losses[0])
        progress.passes = sum(1 + len(auditor.interventions()) for auditor in auditors)
        progress.done(len(auditors))
        for auditor, own in zip(auditors, losses, strict=True):
            auditor.intervene(batch, own, progress.done)
    progress.finish()
    return difference


def _batches(
    packed: PackedSequences, chosen: Sequence[int], batch_size: int, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(chosen), batch_size):
        items = [packed[index] for index in chosen[start : start + batch_size]]
        yield {name: torch.stack([item[name] for item in items]).to(device) for name in items[0]}


def _names(checkpoints: Sequence[Path], models: Sequence[Any]) -> list[str]:
    """The variants, or the folders' names; numbered where they are the same."""
    names = [
        variant_of(model.config) or path.name
        for path, model in zip(checkpoints, models, strict=True)
    ]
    if len(set(names)) == len(names):
        return names
    return [f"{name} ({number})" for number, name in enumerate(names, start=1)]


class Progress:
    """Forward passes done of all: one line that is rewritten on a terminal, else every tenth."""

    def __init__(self, batches: int):
        self.batches, self.passes, self.finished, self.tenths = batches, 1, 0, 0
        self.began, self.live = time.monotonic(), sys.stderr.isatty()

    def done(self, passes: int = 1) -> None:
        self.finished += passes
        total = self.batches * self.passes
        left = (time.monotonic() - self.began) / self.finished * (total - self.finished)
        text = f"audit  pass {self.finished:,}/{total:,}  {left:,.0f} s left"
        if self.live:
            print(f"\r{text}      ", end="", file=sys.stderr, flush=True)
        elif 10 * self.finished // total > self.tenths:
            self.tenths = 10 * self.finished // total
            print(text, file=sys.stderr, flush=True)

    def finish(self) -> None:
        if self.live:
            print(file=sys.stderr)
