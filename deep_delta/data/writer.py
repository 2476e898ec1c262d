"""Appending token ids to shard files so that an interrupted run can go on where it was."""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from deep_delta.data.files import sha256_of
from deep_delta.data.manifest import ShardInfo, SplitInfo
from deep_delta.errors import UserError


@dataclass
class WriterState:
    """What a ShardWriter has written so far.

    open_tokens: tokens in the shard after the `finished` ones; documents may cross shards.
    """

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    open_tokens: int = 0
    finished: list[ShardInfo] = field(default_factory=list)

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
            self._file = self._reopen(state.open_tokens * dtype.itemsize)

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.split}-{len(self.state.finished):05d}.bin"

    def _reopen(self, length: int) -> BinaryIO:
        path = self._path
        if not path.is_file() or path.stat().st_size < length:
            raise UserError(
                f"{path} is missing or shorter than when preparing stopped: "
                f"delete {self.folder} and prepare again"
            )
        file = path.open("r+b")
        file.truncate(length)
        file.seek(length)
        return file

    def add(self, ids: npt.NDArray[np.unsignedinteger], documents: int, text_bytes: int) -> None:
        """Append the ids (1-d) of a number of documents with `text_bytes` of text.

        Each document ends with the end-of-text id.
        """
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

    def sync(self) -> None:
        """Make everything written so far durable, so that `state` may be recorded."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def finish(self) -> SplitInfo:
        """Close the last shard and describe the split."""
        if self._file is not None:
            self._finish_shard()
        state = self.state
        return SplitInfo(state.documents, state.tokens, state.text_bytes, tuple(state.finished))

    def close(self) -> None:
        """Let go of the open file after an error, without making it a finished shard."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def _finish_shard(self) -> None:
        self.sync()
        self.close()
        path = self._path
        self.state.finished.append(ShardInfo(path.name, self.state.open_tokens, sha256_of(path)))
        self.state.open_tokens = 0
