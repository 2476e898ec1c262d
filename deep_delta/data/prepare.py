"""Turning text into token shards: `ddl prepare`. Does not import torch."""

import errno
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from deep_delta.data.files import fsync_folder, write_json_atomically
from deep_delta.data.inputs import Source, find_sources
from deep_delta.data.manifest import MANIFEST_NAME, SPLITS, Manifest, SplitInfo
from deep_delta.data.progress import ProgressLine
from deep_delta.data.tokenizer import TextTokenizer, load_tokenizer
from deep_delta.data.writer import ShardWriter, WriterState
from deep_delta.errors import UserError

PROGRESS_NAME = "progress.json"
BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 2_000_000
CHECKPOINT_BATCHES = 64


class Record(NamedTuple):
    """Document number `document` (from 0) of source number `source`."""

    source: int
    document: int
    text: str


@dataclass
class Progress:
    """Contents of progress.json: everything before (source, document) is in the shards."""

    settings: dict[str, Any]
    source: int
    document: int
    empty_documents: int
    splits: dict[str, WriterState]

    @property
    def begun(self) -> bool:
        """Whether any document is in the shards already."""
        return (self.source, self.document) != (0, 0)

    def save(self, out: Path) -> None:
        """Write progress.json, atomically."""
        splits = {name: state.to_json() for name, state in self.splits.items()}
        write_json_atomically(out / PROGRESS_NAME, {**vars(self), "splits": splits})

    @classmethod
    def load(cls, out: Path) -> "Progress":
        """Read progress.json. Errors: UserError when it is damaged."""
        try:
            record = json.loads((out / PROGRESS_NAME).read_bytes())
            states = {name: WriterState.from_json(record["splits"][name]) for name in SPLITS}
            return cls(**{**record, "splits": states})
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{out / PROGRESS_NAME} is damaged: delete {out} and prepare again"
            ) from error


def prepare(
    inputs: list[str],
    out: Path,
    *,
    tokenizer: str | None = None,
    val_fraction: float = 0.01,
    shard_tokens: int = 100_000_000,
) -> Manifest:
    """Tokenize documents into shards of flat little-endian ids, a manifest and a tokenizer copy.

    inputs: .txt (one document a file), .jsonl, .jsonl.gz, .jsonl.zst, .jsonl.xz (field "text") and
        .parquet files (column "text"), folders of these, or names for `datasets.load_dataset`.
    out: the folder to write. An interrupted run into it goes on where it was and gives the same
        bytes; a finished one is left alone.
    tokenizer: None for the bundled one, a folder, a tokenizer.json, or a hub name.
    val_fraction: share of the documents for "val", in [0, 1); chosen by a hash of the text, so a
        document's split depends on nothing else.
    shard_tokens: tokens in every shard but the last of each split.

    Every document is followed by one end-of-text token; documents of white space are skipped.
    Errors: UserError for input that is missing, unreadable or empty, a tokenizer that can't be
    used, a split without documents, a folder begun with other settings, or a full disk.
    """
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val-fraction must be at least 0 and below 1, not {val_fraction}")
    if shard_tokens < 1:
        raise UserError(f"--shard-tokens must be at least 1, not {shard_tokens}")
    sources = find_sources(inputs)
    loaded = load_tokenizer(tokenizer)
    settings: dict[str, Any] = {
        "inputs": [[source.name, source.fingerprint] for source in sources],
        "tokenizer": [loaded.sha256, loaded.eot_id],
        "val_fraction": val_fraction,
        "shard_tokens": shard_tokens,
    }
    try:
        return _prepare(sources, out, loaded, settings)
    except OSError as error:  # sources turn their own into UserError, so this one is about `out`
        # A quota counts as a full disk; Windows has no such error.
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
            raise UserError(
                f"the disk is full: free some space for {out} and run the same command again, "
                "it continues where it stopped"
            ) from error
        raise UserError(f"can't write {out}: {error.strerror or error}") from error


def _prepare(
    sources: list[Source], out: Path, tokenizer: TextTokenizer, settings: dict[str, Any]
) -> Manifest:
    """`prepare` after its arguments were resolved. Errors: also OSError from writing `out`."""
    start = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    if (out / MANIFEST_NAME).exists():
        manifest = Manifest.load(out)
        _check_settings(out, manifest.settings, settings)
        # Left over when a run ended between writing the manifest and removing this.
        (out / PROGRESS_NAME).unlink(missing_ok=True)
        print(f"{out} is already prepared", file=sys.stderr)
        return manifest
    progress = None
    if (out / PROGRESS_NAME).exists():
        progress = Progress.load(out)
        if progress.begun:
            _check_settings(out, progress.settings, settings)
            print(f"continuing in {out}", file=sys.stderr)
    if (
        progress is None or not progress.begun
    ):  # what wrote nothing, a typing slip say, binds nobody
        progress = Progress(settings, 0, 0, 0, {name: WriterState() for name in SPLITS})
        progress.save(out)
    tokenizer.save(out)

    splits = _write_shards(sources, out, tokenizer, progress)
    manifest = Manifest(
        dtype=tokenizer.dtype.name,
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        tokenizer_name=tokenizer.name,
        tokenizer_sha256=tokenizer.sha256,
        settings=settings,
        empty_documents=progress.empty_documents,
        splits=splits,
    )
    problem = _empty_split(manifest)
    if problem:
        _discard(out, manifest)
        raise UserError(problem)
    manifest.save(out)
    (out / PROGRESS_NAME).unlink()
    _print_summary(out, manifest, time.monotonic() - start)
    return manifest


def _check_settings(out: Path, recorded: dict[str, Any], asked: dict[str, Any]) -> None:
    changed = [name for name in asked if recorded.get(name) != asked[name]]
    if changed:
        raise UserError(
            f"{out} was made with different settings ({', '.join(changed)}): "
            "delete it or choose another folder"
        )


def _write_shards(
    sources: list[Source], out: Path, tokenizer: TextTokenizer, progress: Progress
) -> dict[str, SplitInfo]:
    """Write what `progress` says is still missing, recording progress in it and on disk."""
    val_fraction = progress.settings["val_fraction"]
    shard_tokens = progress.settings["shard_tokens"]
    writers: dict[str, ShardWriter] = {}
    try:
        for name, state in progress.splits.items():
            writers[name] = ShardWriter(out, name, tokenizer.dtype, shard_tokens, state)
        with ProgressLine(len(sources)) as line:
            for number, batch in enumerate(_batches(sources, progress), start=1):
                before = sum(state.tokens for state in progress.splits.values())
                texts = [record.text for record in batch if record.text.strip()]
                _add_texts(texts, tokenizer, val_fraction, writers)
                last = batch[-1]
                progress.source, progress.document = last.source, last.document + 1
                progress.empty_documents += len(batch) - len(texts)
                if number % CHECKPOINT_BATCHES == 0:
                    for writer in writers.values():
                        writer.sync()
                    fsync_folder(out)
                    progress.save(out)
                documents = sum(state.documents for state in progress.splits.values())
                tokens = sum(state.tokens for state in progress.splits.values())
                line.update(last.source, sources[last.source].name, documents, tokens - before)
        return {name: writer.finish() for name, writer in writers.items()}
    finally:
        for writer in writers.values():
            # Closing flushes, which fails again on a full disk; the first error is the one to show.
            with suppress(OSError):
                writer.close()


def _batches(sources: list[Source], progress: Progress) -> Iterator[list[Record]]:
    """The documents from the position of `progress` on, in batches of bounded size."""
    batch: list[Record] = []
    characters = 0
    first = progress.source
    for index in range(first, len(sources)):
        start = progress.document if index == first else 0
        for number, text in enumerate(sources[index].documents(start), start):
            batch.append(Record(index, number, text))
            characters += len(text)
            if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _add_texts(
    texts: list[str],
    tokenizer: TextTokenizer,
    val_fraction: float,
    writers: dict[str, ShardWriter],
) -> None:
    by_split: dict[str, list[Any]] = {name: [] for name in writers}
    text_bytes = dict.fromkeys(writers, 0)
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        data = text.encode()
        split = "val" if _hash_fraction(data) < val_fraction else "train"
        by_split[split].append(ids)
        text_bytes[split] += len(data)
    for name, writer in writers.items():
        writer.add(by_split[name], text_bytes[name])


def _hash_fraction(data: bytes) -> float:
    """A number in [0, 1) from the SHA-256 of UTF-8 text; 53 bits, which a float holds exactly."""
    return (int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 11) / 2**53


def _empty_split(manifest: Manifest) -> str | None:
    """Why the result can't be used, when a split that was asked for got no document."""
    train, val = (manifest.splits[name].documents for name in SPLITS)
    if train + val == 0:
        return "the input has no text"
    if train == 0:
        return "no document fell into the training split: lower --val-fraction or add documents"
    if val == 0 and manifest.settings["val_fraction"] > 0:
        return (
            f"none of the {train:,} documents fell into the validation split, whole documents as "
            "they are (a .txt file is one): raise --val-fraction or add documents"
        )
    return None


def _discard(out: Path, manifest: Manifest) -> None:
    """Remove what was written, so that a run with other settings can use the folder."""
    (out / PROGRESS_NAME).unlink()
    for split in manifest.splits.values():
        for shard in split.shards:
            (out / shard.name).unlink()


def _print_summary(out: Path, manifest: Manifest, seconds: float) -> None:
    counts = "; ".join(
        f"{name} {split.documents:,} documents, {split.tokens:,} tokens"
        for name, split in manifest.splits.items()
    )
    print(
        f"prepared {out}: {counts}; {manifest.empty_documents:,} empty skipped; {seconds:.1f} s",
        file=sys.stderr,
    )
