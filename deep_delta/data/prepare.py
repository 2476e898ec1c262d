"""Turning text into token shards: `ddl prepare`. Does not import torch."""

import errno
import json
import sys
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from deep_delta.data.encode import Encoded, Fractions, chunks
from deep_delta.data.files import fsync_folder, write_json_atomically
from deep_delta.data.inputs import Source, find_sources
from deep_delta.data.manifest import MANIFEST_NAME, SOURCES_NAME, SPLITS, Manifest, SplitInfo
from deep_delta.data.progress import ProgressLine
from deep_delta.data.tokenizer import TextTokenizer, load_tokenizer
from deep_delta.data.workers import encode_all
from deep_delta.data.writer import ShardWriter, WriterState
from deep_delta.errors import UserError

PROGRESS_NAME = "progress.json"
CHECKPOINT_CHUNKS = 64
LEAST_TEST_DOCUMENTS = 5  # with fewer, `ddl eval` gives a loss without an interval
LEAST_TEST_TOKENS = 1024  # a sequence of the recipes


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
            names = _splits_of(record["settings"])
            states = {name: WriterState.from_json(record["splits"][name]) for name in names}
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
    test_fraction: float = 0,
    shard_tokens: int = 100_000_000,
    max_tokens: int | None = None,
    processes: int = 1,
) -> Manifest:
    """Tokenize documents into shards of flat little-endian ids, a manifest and a tokenizer copy.

    inputs: .txt (one document a file), .jsonl, .jsonl.gz, .jsonl.zst, .jsonl.xz (field "text") and
        .parquet files (column "text"), folders of these, or data sets for `datasets`: NAME or
        NAME:CONFIGURATION, of which the split "train" is read.
    out: the folder to write. An interrupted run into it goes on where it was and gives the same
        bytes; a finished one is left alone.
    tokenizer: None for the bundled one, a folder, a tokenizer.json, or a hub name.
    val_fraction: share of the documents for "val", in [0, 1); chosen by a hash of the text, so a
        document's split depends on nothing else.
    test_fraction: likewise for "test", other documents than those of "val", whatever the shares;
        0 for no such split. The documents of "val" are the same with it and without.
    shard_tokens: tokens in every shard but the last of each split.
    max_tokens: stop with the document that brings the training split to this many; None: read all.
    processes: how many tokenize, each with one thread; 1 uses this process and threads of the
        tokenizer. The bytes are the same for any number, which may change when a run goes on. A
        script that asks for several needs the usual `if __name__ == "__main__":`.

    Every document is followed by one end-of-text token; documents of white space are skipped.
    Where records have a string "source_file" beside the text, val.sources.txt has a line with it
    for each validation document, and test.sources.txt for each test document; one without is a
    source of its own.
    Errors: UserError for input that is missing, unreadable or empty, a tokenizer that can't be
    used, a split without documents, a test split too small to say much, a folder begun with other
    settings, a process that was ended, or a full disk.
    """
    if not 0 <= val_fraction < 1:
        raise UserError(f"--val-fraction must be at least 0 and below 1, not {val_fraction}")
    if not 0 <= test_fraction < 1:
        raise UserError(f"--test-fraction must be at least 0 and below 1, not {test_fraction}")
    if val_fraction + test_fraction >= 1:
        raise UserError("--val-fraction and --test-fraction leave nothing to train on: lower one")
    if shard_tokens < 1:
        raise UserError(f"--shard-tokens must be at least 1, not {shard_tokens}")
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"--max-tokens must be at least 1, not {max_tokens}")
    if max_tokens is not None and test_fraction > 0:
        expected = max_tokens * test_fraction / (1 - val_fraction - test_fraction)
        if expected < LEAST_TEST_TOKENS:
            raise UserError(
                f"--max-tokens {max_tokens} and --test-fraction {test_fraction} give a test split "
                f"of about {expected:,.0f} tokens, which is less than {LEAST_TEST_TOKENS:,}: raise "
                "one of them"
            )
    if processes < 1:
        raise UserError(f"--processes must be at least 1, not {processes}")
    sources = find_sources(inputs)
    loaded = load_tokenizer(tokenizer)
    settings: dict[str, Any] = {
        "inputs": [[source.name, source.fingerprint] for source in sources],
        "tokenizer": [loaded.sha256, loaded.eot_id],
        "val_fraction": val_fraction,
        "shard_tokens": shard_tokens,
        "max_tokens": max_tokens,
    }
    if test_fraction > 0:  # else not there, as in folders made before there was such a split
        settings["test_fraction"] = test_fraction
    try:
        return _prepare(sources, out, loaded, settings, processes)
    except OSError as error:  # sources turn their own into UserError, so this one is about `out`
        # A quota counts as a full disk; Windows has no such error.
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
            raise UserError(
                f"the disk is full: free some space for {out} and run the same command again, "
                "it continues where it stopped"
            ) from error
        raise UserError(f"can't write {out}: {error.strerror or error}") from error


def _prepare(
    sources: list[Source],
    out: Path,
    tokenizer: TextTokenizer,
    settings: dict[str, Any],
    processes: int,
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
            progress.settings = settings  # those of an older version lack some of them
            print(f"continuing in {out}", file=sys.stderr)
    if (
        progress is None or not progress.begun
    ):  # what wrote nothing, a typing slip say, binds nobody
        states = {
            name: WriterState(source_bytes=None if name == "train" else 0)
            for name in _splits_of(settings)
        }
        progress = Progress(settings, 0, 0, 0, states)
        progress.save(out)
    tokenizer.save(out)

    splits = _write_shards(sources, out, tokenizer, progress, processes)
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
    problem = _useless_split(manifest)
    if problem:
        _discard(out, manifest)
        raise UserError(problem)
    manifest.save(out)
    (out / PROGRESS_NAME).unlink()
    wanted, made = settings["max_tokens"], splits["train"].tokens
    if wanted is not None and made < wanted:
        print(f"the input has only {made:,} training tokens, not {wanted:,}", file=sys.stderr)
    _print_summary(out, manifest, time.monotonic() - start)
    return manifest


def _splits_of(settings: dict[str, Any]) -> list[str]:
    """The splits that these settings make."""
    return [name for name in SPLITS if name != "test" or "test_fraction" in settings]


def _check_settings(out: Path, recorded: dict[str, Any], asked: dict[str, Any]) -> None:
    names = {**asked, **recorded}
    changed = [name for name in names if recorded.get(name) != asked.get(name)]
    if changed:
        raise UserError(
            f"{out} was made with different settings ({', '.join(changed)}): "
            "delete it or choose another folder"
        )


def _write_shards(
    sources: list[Source],
    out: Path,
    tokenizer: TextTokenizer,
    progress: Progress,
    processes: int,
) -> dict[str, SplitInfo]:
    """Write what `progress` says is still missing, recording progress in it and on disk."""
    settings = progress.settings
    fractions = Fractions(settings["val_fraction"], settings.get("test_fraction", 0))
    max_tokens = settings["max_tokens"]
    train = progress.splits["train"]
    pending = chunks(sources, progress.source, progress.document)
    writers: dict[str, ShardWriter] = {}
    try:
        for name, state in progress.splits.items():
            shard_tokens = settings["shard_tokens"]
            writers[name] = ShardWriter(out, name, tokenizer.dtype, shard_tokens, state)
        with (
            closing(encode_all(pending, tokenizer, fractions, processes)) as results,
            ProgressLine(len(sources)) as line,
        ):
            for number, (chunk, encoded) in enumerate(results, start=1):
                if max_tokens is not None:
                    encoded = _up_to(encoded, max_tokens - train.tokens)
                _add(encoded, writers)
                progress.empty_documents += int(np.count_nonzero(encoded.lengths == 0))
                if max_tokens is not None and train.tokens >= max_tokens:
                    break  # before progress is recorded: the rest of the chunk was left out
                progress.source, progress.document = chunk.source, chunk.document
                if number % CHECKPOINT_CHUNKS == 0:
                    for writer in writers.values():
                        writer.sync()
                    fsync_folder(out)
                    progress.save(out)
                documents = sum(state.documents for state in progress.splits.values())
                line.update(chunk.source, sources[chunk.source].name, documents, len(encoded.ids))
        return {name: writer.finish() for name, writer in writers.items()}
    finally:
        for writer in writers.values():
            # Closing flushes, which fails again on a full disk; the first error is the one to show.
            with suppress(OSError):
                writer.close()


def _up_to(encoded: Encoded, train_tokens: int) -> Encoded:
    """The documents up to the one with which those for training have `train_tokens` tokens."""
    in_train = encoded.split == SPLITS.index("train")
    totals = np.cumsum(np.where(in_train, encoded.lengths, 0))
    return encoded.first(int(np.searchsorted(totals, train_tokens)) + 1)


def _add(encoded: Encoded, writers: dict[str, ShardWriter]) -> None:
    for name, writer in writers.items():
        chosen = (encoded.split == SPLITS.index(name)) & (encoded.lengths > 0)
        ids = encoded.ids[np.repeat(chosen, encoded.lengths)]
        named = list(compress(encoded.sources, chosen))
        writer.add(ids, int(chosen.sum()), int(encoded.text_bytes[chosen].sum()), named)


def _useless_split(manifest: Manifest) -> str | None:
    """Why the result can't be used, when a split that was asked for got no or few documents."""
    documents = {name: split.documents for name, split in manifest.splits.items()}
    whole = sum(documents.values())
    whole_documents = "whole documents as they are (a .txt file is one)"
    if whole == 0:
        return "the input has no text"
    if documents["train"] == 0:
        lower = " or ".join(f"--{name}-fraction" for name in documents if name != "train")
        return f"no document fell into the training split: lower {lower} or add documents"
    if documents["val"] == 0 and manifest.settings["val_fraction"] > 0:
        return (
            f"none of the {whole:,} documents fell into the validation split, {whole_documents}: "
            "raise --val-fraction or add documents"
        )
    if documents.get("test", LEAST_TEST_DOCUMENTS) < LEAST_TEST_DOCUMENTS:
        return (
            f"{documents['test']} of the {whole:,} documents fell into the test split, "
            f"{whole_documents}; it needs {LEAST_TEST_DOCUMENTS}: raise --test-fraction or add "
            "documents"
        )
    return None


def _discard(out: Path, manifest: Manifest) -> None:
    """Remove what was written, so that a run with other settings can use the folder."""
    (out / PROGRESS_NAME).unlink()
    for name, split in manifest.splits.items():
        for shard in split.shards:
            (out / shard.name).unlink()
        (out / SOURCES_NAME.format(split=name)).unlink(missing_ok=True)


def _print_summary(out: Path, manifest: Manifest, seconds: float) -> None:
    counts = "; ".join(
        f"{name} {split.documents:,} documents, {split.tokens:,} tokens"
        for name, split in manifest.splits.items()
    )
    print(
        f"prepared {out}: {counts}; {manifest.empty_documents:,} empty skipped; {seconds:.1f} s",
        file=sys.stderr,
    )
