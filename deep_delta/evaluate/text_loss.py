"""Loss, perplexity and bits per byte on a folder that `ddl prepare` made.

What is counted: every token of every document, once, in nats. End-of-text tokens are never
predicted; one stands before each document as its only context. Loss is the mean over these tokens,
perplexity its exponential, and bits per byte their sum in bits over the UTF-8 bytes of the
documents' text.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from tqdm import tqdm

from deep_delta.checkpoint import check_fits
from deep_delta.data import Manifest, TokenShards
from deep_delta.data.files import sha256_of
from deep_delta.data.manifest import SOURCES_NAME
from deep_delta.data.shards import IGNORED_LABEL
from deep_delta.errors import UserError
from deep_delta.evaluate.bootstrap import ratio_intervals
from deep_delta.evaluate.checkpoint import Checkpoint
from deep_delta.evaluate.windows import Window, windows

LEVEL = 0.95
READ_TOKENS = 4_000_000  # tokens of whole documents that are in memory at once
DECODED_DOCUMENTS = 256


def data_identity(folder: Path, split: str) -> dict[str, Any]:
    """What the result on a split depends on: hashes of its shards, its sources and the tokenizer.

    Errors: UserError for a folder that is not prepared, or has no such split.
    """
    manifest = Manifest.load(folder)
    names = [[shard.name, shard.sha256] for shard in manifest.split(split, folder).shards]
    sources = folder / SOURCES_NAME.format(split=split)
    return {
        "shards_sha256": hashlib.sha256(json.dumps(names).encode()).hexdigest(),
        "tokenizer_sha256": manifest.tokenizer_sha256,
        "sources_sha256": sha256_of(sources) if sources.is_file() else None,
    }


def text_loss(
    checkpoint: Checkpoint,
    folder: Path,
    split: str,
    context: int,
    batch_size: int,
    limit: int | None,
) -> dict[str, Any]:
    """Loss on a split of a prepared folder, with intervals over what is independent.

    context: tokens of a window; see `windows`. limit: the first documents only; None for all.

    Returns loss and perplexity (nats per token), bits_per_byte, each a dict of mean, low and high
    (None without an interval); documents, tokens, bytes; groups, grouped_by ("source" or
    "document"); level.

    Errors: UserError for data that can't be read or was made with another tokenizer.
    """
    shards = TokenShards.open(folder, split)
    tokenizer = check_fits(checkpoint.folder, checkpoint.model, shards)
    borders = _borders(shards)[: None if limit is None else limit + 1]
    documents = len(borders) - 1
    tokens = np.diff(borders) - 1.0
    if not tokens.sum():
        raise UserError(f"{folder} has no whole document in the split {split!r}")
    sources = _sources(folder, split, shards.manifest.splits[split].documents)
    nats, text_bytes = np.zeros(documents), np.zeros(documents)
    with tqdm(total=int(tokens.sum()), desc=f"{split} loss", unit=" tokens") as bar:
        for first, last in _blocks(borders):
            block = [
                shards.tokens(int(borders[i]), int(borders[i + 1]) - 1) for i in range(first, last)
            ]
            text_bytes[first:last] = _text_bytes(block, tokenizer)
            eot = shards.manifest.eot_id
            for window, total in _losses(checkpoint, block, eot, context, batch_size):
                nats[first + window.document] += total
                bar.update(window.stop - window.first)
    if not np.isfinite(nats).all():
        raise UserError(f"{checkpoint.folder} gives losses that are no numbers: it has diverged")
    return _summary(nats, tokens, text_bytes, None if sources is None else sources[:documents])


def _summary(
    nats: np.ndarray, tokens: np.ndarray, text_bytes: np.ndarray, sources: list[str] | None
) -> dict[str, Any]:
    """The result from what each document has; arrays (documents,)."""
    groups = np.arange(len(nats))
    if sources is not None:
        groups = np.unique(sources, return_inverse=True)[1]
    sums = [
        np.bincount(groups, weights=values).astype(np.float64)
        for values in (nats, tokens, text_bytes)
    ]
    loss, bits = ratio_intervals(sums[0], sums[1:], LEVEL)
    per_token, per_byte = nats.sum() / tokens.sum(), nats.sum() / text_bytes.sum()
    low, high = loss or (None, None)
    return {
        "loss": {"mean": float(per_token), "low": low, "high": high},
        "perplexity": {
            "mean": math.exp(per_token),
            "low": None if low is None else math.exp(low),
            "high": None if high is None else math.exp(high),
        },
        "bits_per_byte": {
            "mean": float(per_byte / math.log(2)),
            "low": None if bits is None else bits[0] / math.log(2),
            "high": None if bits is None else bits[1] / math.log(2),
        },
        "documents": len(nats),
        "tokens": int(tokens.sum()),
        "bytes": int(text_bytes.sum()),
        "groups": len(sums[0]),
        "grouped_by": "document" if sources is None else "source",
        "level": LEVEL,
    }


def _losses(
    checkpoint: Checkpoint, block: list[np.ndarray], eot: int, context: int, batch_size: int
) -> Iterator[tuple[Window, float]]:
    """Every window of the block with its nats, in batches of like length, longest first."""
    pending = [w for i, ids in enumerate(block) for w in windows(i, len(ids), context)]
    pending.sort(key=lambda window: window.start - window.stop)
    for at in range(0, len(pending), batch_size):
        batch = pending[at : at + batch_size]
        yield from zip(batch, _batch_nats(checkpoint, block, batch, eot), strict=True)


@torch.inference_mode()
def _batch_nats(
    checkpoint: Checkpoint, block: list[np.ndarray], batch: list[Window], eot: int
) -> list[float]:
    model = checkpoint.model
    length = max(window.stop - window.start for window in batch)
    # What comes after a row's end does not reach it: attention and convolutions look back only.
    inputs = torch.full((len(batch), length), eot)
    targets = torch.full((len(batch), length), IGNORED_LABEL)
    for row, window in enumerate(batch):
        ids = torch.from_numpy(block[window.document])
        given = F.pad(ids, (1, 0), value=eot)
        inputs[row, : window.stop - window.start] = given[window.start : window.stop]
        counted = slice(window.first - window.start, window.stop - window.start)
        targets[row, counted] = ids[window.first : window.stop]
    hidden = model.model(inputs.to(model.device), use_cache=False).last_hidden_state
    nats = []
    for row in range(len(batch)):  # the logits of one row at a time: they are larger than the model
        logits = model.lm_head(hidden[row]).float() * model.config.logit_factor
        each = F.cross_entropy(
            logits, targets[row].to(model.device), ignore_index=IGNORED_LABEL, reduction="none"
        )
        nats.append(float(each.double().sum()))
    return nats


def _borders(shards: TokenShards) -> np.ndarray:
    """Where documents start: document i is tokens i up to i + 1, its end-of-text token included."""
    ends = [np.zeros(1, dtype=np.int64)]
    for start in range(0, len(shards), READ_TOKENS):
        ids = shards.tokens(start, min(len(shards), start + READ_TOKENS))
        ends.append(np.flatnonzero(ids == shards.manifest.eot_id) + start + 1)
    return np.concatenate(ends)


def _blocks(borders: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive documents of about READ_TOKENS tokens, at least one each."""
    first = 0
    while first < len(borders) - 1:
        last = int(np.searchsorted(borders, borders[first] + READ_TOKENS, side="right")) - 1
        last = max(first + 1, last)
        yield first, last
        first = last


def _text_bytes(block: list[np.ndarray], tokenizer: Tokenizer) -> list[int]:
    """UTF-8 bytes of each document's text, decoded."""
    counts = []
    for at in range(0, len(block), DECODED_DOCUMENTS):
        ids = [document.tolist() for document in block[at : at + DECODED_DOCUMENTS]]
        texts = tokenizer.decode_batch(ids, skip_special_tokens=False)
        counts += [len(text.encode()) for text in texts]
    return counts


def _sources(folder: Path, split: str, documents: int) -> list[str] | None:
    """The source of each document, where the folder names them; None where it does not."""
    path = folder / SOURCES_NAME.format(split=split)
    if not path.is_file():
        return None
    names = path.read_text(encoding="utf-8").splitlines()
    if len(names) != documents:
        raise UserError(
            f"{path} names {len(names):,} sources for {documents:,} documents: it needs a line each"
        )
    return names
