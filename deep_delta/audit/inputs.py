"""What an audit reads: the checkpoint, the text, and the bins that its tokens fall into."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deep_delta.checkpoint import load_model
from deep_delta.data import TokenShards, prepare_bundled
from deep_delta.errors import UserError
from deep_delta.model import DeepDeltaForCausalLM

SPLIT = "val"
LONGEST = 1024  # tokens of a sequence, unless told otherwise
FREQUENCIES = (10, 100, 1_000, 10_000)  # borders: occurrences per million tokens
COUNT_AT_ONCE = 1 << 22


def load(path: Path) -> DeepDeltaForCausalLM:
    """A checkpoint's model by the reference, everything in fp32. UserError as in `load_model`."""
    return load_model(path, backend="reference", state_dtype=None, dtype="float32")


def trained_on(checkpoint: Path, model: DeepDeltaForCausalLM) -> tuple[int, bool]:
    """(tokens of a sequence, whether documents are kept apart) of the training, if known.

    That is what recipe.yaml says, which `ddl train` leaves beside the checkpoint; without it the
    longest sequence that the model takes, at most LONGEST, and documents that follow one another.
    """
    recipe = checkpoint.resolve().parent / "recipe.yaml"
    fields: Any = None
    if recipe.is_file():
        import yaml

        try:
            fields = yaml.safe_load(recipe.read_text(encoding="utf-8"))
        except yaml.YAMLError:
            raise UserError(f"{recipe} is not YAML: mend it or move it away") from None
    fields = fields if isinstance(fields, dict) else {}
    longest = min(LONGEST, model.config.max_position_embeddings)
    return int(fields.get("seq_len", longest)), bool(fields.get("mask_documents", False))


def open_text(folder: str, out: Path) -> TokenShards:
    """The validation split of a prepared folder; "bundled" is the package's text, below `out`."""
    path = prepare_bundled(out / "data") if folder == "bundled" else Path(folder)
    return TokenShards.open(path, SPLIT)


def position_bins(seq_len: int) -> tuple[list[str], Tensor]:
    """Labels of bins that double in width (0, 1, 2–3, 4–7, …), and each position's bin (T,)."""
    starts = [0, *(1 << power for power in range((seq_len - 1).bit_length()))]
    ends = [*starts[1:], seq_len]
    labels = [
        str(start) if end - start == 1 else f"{start}–{end - 1}"
        for start, end in zip(starts, ends, strict=True)
    ]
    bins = torch.bucketize(torch.arange(seq_len), torch.tensor(starts[1:]), right=True)
    return labels, bins


def frequency_bins(shards: TokenShards, vocab_size: int) -> tuple[list[str], Tensor]:
    """Labels of bins by occurrences per million tokens of the split; each id's bin (vocab,)."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(shards), COUNT_AT_ONCE):
        ids = shards.tokens(start, min(start + COUNT_AT_ONCE, len(shards)))
        counts += np.bincount(ids, minlength=vocab_size)
    rate = torch.from_numpy(counts * (1e6 / len(shards)))
    borders = [f"{border:,}" for border in FREQUENCIES]
    labels = [f"< {borders[0]}"]
    labels += [f"{low}–{high}" for low, high in itertools.pairwise(borders)]
    labels.append(f"≥ {borders[-1]}")
    edges = torch.tensor(FREQUENCIES, dtype=torch.float64)
    return labels, torch.bucketize(rate, edges, right=True)
