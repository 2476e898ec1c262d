"""Appending token ids to shard files so that an interrupted run can go on where it was."""

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from itertools import chain, repeat
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from deep_delta.data.files import sha256_of
from deep_delta.data.manifest import SOURCES_NAME, ShardInfo, SplitInfo
from deep_delta.errors import UserError


@dataclass
class WriterState:
    """What a ShardWriter has written so far.

    open_tokens: tokens in the shard after the `finished` ones; documents may cross shards.
    source_bytes: of the file with the documents' sources, which begins when the first document
        names one; None to write no such file.
    """

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    open_tokens: int = 0
    finished: list[ShardInfo] = field(default_factory=list)
    # None also where progress.json does not say, from an older version: lines would be missing.
    source_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON values, for progress.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        """The inverse of `to_json`. Errors: KeyError, TypeError for another record."""
        finished = [ShardInfo(**shard) for shard in record["finished"]]
        return cls(**{**record, "finished": finished})


class ShardWriter:
    """Writes one split as `SPLIT-00000.bin`, `SPLIT-00001.bin` … of exactly `shard_tokens` tokens.

    The last shard may be shorter. The bytes depend only on the ids, not on how they were batched or
    where the run was interrupted. Errors: OSError as the file system gives it.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: np.dtype[np.unsignedinteger],
        shard_tokens: int,
        state: WriterState,
    ) -> None:
        """Continue from `state`: what the open shard holds beyond it is cut off.

        Errors: UserError when a shard is shorter than `state` says.
        """
        self.folder = folder
        self.split = split
        self.dtype = dtype
        self.shard_tokens = shard_tokens
        self.state = state
        self._file: BinaryIO | None = None
        if state.open_tokens:
            self._file = self._reopen(self._path, state.open_tokens * dtype.itemsize)
        self._sources: BinaryIO | None = None
        if state.source_bytes:
            self._sources = self._reopen(self._sources_path, state.source_bytes)
        elif state.source_bytes == 0:
            self._sources_path.unlink(missing_ok=True)  # of a run that recorded nothing

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.split}-{len(self.state.finished):05d}.bin"

    @property
    def _sources_path(self) -> Path:
        return self.folder / SOURCES_NAME.format(split=self.split)

    def _reopen(self, path: Path, length: int) -> BinaryIO:
        if not path.is_file() or path.stat().st_size < length:
            raise UserError(
                f"{path} is missing or shorter than when preparing stopped: "
                f"delete {self.folder} and prepare again"
            )
        file = path.open("r+b")
        file.truncate(length)
        file.seek(length)
        return file

    def add(
        self,
        ids: npt.NDArray[np.unsignedinteger],
        documents: int,
        text_bytes: int,
        sources: Sequence[str | None] = (),
    ) -> None:
        """Append the ids (1-d) of a number of documents with `text_bytes` of text.

        Each document ends with the end-of-text id. sources: the name of each document's source
        without line breaks, None for a document without; not needed if none are written.
        """
        self._add_sources(sources)
        self.state.documents += documents
        self.state.tokens += len(ids)
        self.state.text_bytes += text_bytes
        while len(ids):
            if self._file is None:
                self._file = self._path.open("wb")
            fits = ids[: self.shard_tokens - self.state.open_tokens]
            self._file.write(fits.astype(self.dtype, copy=False).tobytes())
            self.state.open_tokens += len(fits)
            ids = ids[len(fits) :]
            if self.state.open_tokens == self.shard_tokens:
                self._finish_shard()

    def _add_sources(self, sources: Sequence[str | None]) -> None:
        """A line for each document; `state` does not count these documents yet."""
        state = self.state
        if state.source_bytes is None or not (state.source_bytes or any(sources)):
            return
        lines: Iterable[str | None] = sources
        first = state.documents + 1
        if self._sources is None:
            self._sources = self._sources_path.open("wb")
            lines, first = chain(repeat(None, state.documents), sources), 1
        for number, source in enumerate(lines, start=first):
            # A document without a source is one of its own. No other has this name: none has a tab.
            line = source or f"document\t{number}"
            data = line.encode(errors="backslashreplace")  # a record may have a lone surrogate
            state.source_bytes += self._sources.write(data + b"\n")

    def sync(self) -> None:
        """Make everything written so far durable, so that `state` may be recorded."""
        for file in (self._file, self._sources):
            if file is not None:
                file.flush()
                os.fsync(file.fileno())

    def finish(self) -> SplitInfo:
        """Close the last shard, and the sources, and describe the split."""
        if self._file is not None:
            self._finish_shard()
        self.sync()
        self.close()
        state = self.state
        return SplitInfo(state.documents, state.tokens, state.text_bytes, tuple(state.finished))

    def close(self) -> None:
        """Let go of the open files, without making the open shard a finished one."""
        files = [file for file in (self._file, self._sources) if file is not None]
        self._file = self._sources = None
        with ExitStack() as stack:  # also the second where closing the first fails
            for file in files:
                stack.callback(file.close)

    def _finish_shard(self) -> None:
        assert self._file is not None
        self.sync()
        file, self._file = self._file, None
        file.close()
        path = self._path
        self.state.finished.append(ShardInfo(path.name, self.state.open_tokens, sha256_of(path)))
        self.state.open_tokens = 0
