"""Reading prepared token shards, and cutting them into training sequences."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from deep_delta.data.files import sha256_of
from deep_delta.data.manifest import Manifest, ShardInfo
from deep_delta.data.tokenizer import TOKENIZER_NAME
from deep_delta.errors import UserError

# The label that cross-entropy skips.
IGNORED_LABEL = -100
VERIFY_BYTES = 16 * 1024 * 1024

# (path, mtime in ns, size) -> (SHA-256, largest id): a process hashes a shard once while it is the
# same file, however often it is opened.
_verified: dict[tuple[str, int, int], tuple[str, int]] = {}


class TokenShards:
    """The tokens of one split as one long sequence, memory-mapped. Make it with `open`.

    folder, manifest: the folder, and its manifest for all splits.
    """

    def __init__(self, folder: Path, manifest: Manifest, shards: Sequence[ShardInfo]) -> None:
        """`shards` of one split, in order."""
        self.folder = folder
        self.manifest = manifest
        self._shards = shards
        self._paths = [folder / shard.name for shard in shards]
        lengths = [shard.tokens for shard in shards]
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        # Shard i holds the tokens from _borders[i] up to _borders[i + 1].
        self._borders = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self._maps: dict[int, npt.NDArray[np.unsignedinteger]] = {}

    @classmethod
    def open(cls, folder: Path, split: str, *, verify: bool = True) -> Self:
        """Open the split "train", "val" or "test" of a prepared folder.

        verify: as the method of this name, too; existence, size and the tokenizer copy are
            checked in any case.
        Errors: UserError for a folder that is not prepared, an empty split, a missing, cut or
        corrupt shard, or a tokenizer that is not the one the shards were made with.
        """
        manifest = Manifest.load(folder)
        check_same_tokenizer(manifest, folder)
        info = manifest.split(split, folder)
        opened = cls(folder, manifest, info.shards)
        for path, shard in zip(opened._paths, info.shards, strict=True):
            _check_size(path, shard, np.dtype(manifest.dtype).itemsize)
        if verify:
            opened.verify()
        return opened

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Read shards once and check their SHA-256 and that their ids are in the vocabulary.

        part, parts: every `parts`-th shard, beginning with number `part`, so that several
            processes can share the work.
        Errors: UserError for a shard that is corrupt or was made with a larger vocabulary.
        """
        for path, shard in list(zip(self._paths, self._shards, strict=True))[part::parts]:
            _check_contents(path, shard, self.manifest)

    @property
    def sha256(self) -> list[str]:
        """The hash of each shard."""
        return [shard.sha256 for shard in self._shards]

    def __len__(self) -> int:
        """Number of tokens."""
        return int(self._borders[-1])

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Tokens `start` up to `stop` (exclusive) as a new int64 array, across shard borders.

        Errors: IndexError unless 0 <= start <= stop <= len(self).
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of {len(self)}")
        result = np.empty(stop - start, dtype=np.int64)
        shard = int(np.searchsorted(self._borders, start, side="right")) - 1
        position = start
        while position < stop:
            begin, end = int(self._borders[shard]), int(self._borders[shard + 1])
            upto = min(stop, end)
            result[position - start : upto - start] = self._map(shard)[
                position - begin : upto - begin
            ]
            position = upto
            shard += 1
        return result

    def place(self, token: int) -> tuple[str, int]:
        """The file name of the shard that holds a token, and the token's offset in it.

        Errors: IndexError unless 0 <= token < len(self).
        """
        if not 0 <= token < len(self):
            raise IndexError(f"token {token} of {len(self)}")
        shard = int(np.searchsorted(self._borders, token, side="right")) - 1
        return self._paths[shard].name, token - int(self._borders[shard])

    def _map(self, shard: int) -> npt.NDArray[np.unsignedinteger]:
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self._paths[shard], dtype=self._dtype, mode="r")
        return self._maps[shard]

    def __getstate__(self) -> dict[str, Any]:
        # Pickling a map would copy the shard into every data-loader worker; they map it again.
        return {**self.__dict__, "_maps": {}}


class PackedSequences(Dataset[dict[str, torch.Tensor]]):
    """Consecutive sequences of `seq_len` tokens, without overlap; a last partial one is dropped.

    Item i holds tokens i * seq_len up to (i + 1) * seq_len as int64 tensors of shape (seq_len,):
    "input_ids", and "labels" with the same ids (the model shifts them, so a sequence gives
    seq_len - 1 predictions).

    With mask_documents it also holds "position_ids", which start at 0 and start again after each
    end-of-text token; labels are -100 where the position is 0, so that no document is predicted
    from the one before it. The end-of-text token is still predicted, by its own document.
    """

    def __init__(self, shards: TokenShards, seq_len: int, *, mask_documents: bool = False) -> None:
        """Errors: UserError when there are fewer than `seq_len` tokens, or seq_len is below 2."""
        if seq_len < 2:
            raise UserError(f"a sequence needs at least 2 tokens, not {seq_len}")
        if len(shards) < seq_len:
            raise UserError(
                f"the data has {len(shards):,} tokens, fewer than one sequence of {seq_len:,}: "
                "prepare more text or use shorter sequences"
            )
        self.shards = shards
        self.seq_len = seq_len
        self.mask_documents = mask_documents

    def __len__(self) -> int:
        """Number of whole sequences."""
        return len(self.shards) // self.seq_len

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Sequence `index`. Errors: IndexError unless 0 <= index < len(self)."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        start = index * self.seq_len
        input_ids = torch.from_numpy(self.shards.tokens(start, start + self.seq_len))
        item = {"input_ids": input_ids, "labels": input_ids.clone()}
        if self.mask_documents:
            positions = _positions(input_ids, self.shards.manifest.eot_id)
            item["position_ids"] = positions
            item["labels"][positions == 0] = IGNORED_LABEL
        return item


def spread(count: int, total: int) -> list[int]:
    """`count` indices spread evenly over range(total), ascending, each once; all if count >= total.

    Where fewer sequences are read than there are, so that they come from all documents and not from
    the first ones alone.
    """
    count = min(count, total)
    return [index * total // count for index in range(count)]


def _positions(input_ids: torch.Tensor, eot_id: int) -> torch.Tensor:
    """Offset of each token from its document's start in the sequence; int64, like `input_ids`."""
    index = torch.arange(len(input_ids))
    starts = torch.zeros_like(index)
    # The token after an end-of-text token starts a document; others take over the start before.
    starts[1:] = torch.where(input_ids[:-1] == eot_id, index[1:], 0)
    return index - starts.cummax(0).values


def check_tokenizer(manifest: Manifest, vocab_size: int) -> None:
    """Check that a model with `vocab_size` embeddings can read the ids of the shards.

    Errors: UserError when the tokenizer has more ids. Fewer are fine: padding stays unused.
    """
    if manifest.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer does not match the model: the data was made with the tokenizer "
            f"{manifest.tokenizer_name} of {manifest.vocab_size:,} ids, the model has a vocabulary "
            f"of {vocab_size:,}: set the model's vocab_size to at least {manifest.vocab_size} or "
            "prepare the data with the model's tokenizer"
        )


def check_same_tokenizer(manifest: Manifest, folder: Path) -> None:
    """Check that tokenizer.json in `folder` is the one the shards were made with.

    Errors: UserError when it is missing or another.
    """
    path = folder / TOKENIZER_NAME
    if not path.is_file():
        raise UserError(f"{folder} has no {TOKENIZER_NAME}: run ddl prepare into another folder")
    if sha256_of(path) != manifest.tokenizer_sha256:
        raise UserError(
            f"{path} is a tokenizer that does not match the shards: put back the one they were "
            "made with, or run ddl prepare into another folder"
        )


def _check_size(path: Path, shard: ShardInfo, itemsize: int) -> None:
    if not path.is_file():
        raise UserError(f"the shard {path} is missing: run ddl prepare into another folder")
    size, expected = path.stat().st_size, shard.tokens * itemsize
    if size != expected:
        raise UserError(
            f"the shard {path} has {size:,} bytes instead of {expected:,}: copy it again or run "
            "ddl prepare into another folder"
        )


def _check_contents(path: Path, shard: ShardInfo, manifest: Manifest) -> None:
    stat = path.stat()
    key = (str(path.resolve()), stat.st_mtime_ns, stat.st_size)
    if key not in _verified:
        _verified[key] = _hash_and_largest(path, np.dtype(manifest.dtype).newbyteorder("<"))
    sha256, largest = _verified[key]
    if sha256 != shard.sha256:
        raise UserError(
            f"the shard {path} is corrupt (its SHA-256 differs from the manifest): copy it again "
            "or run ddl prepare into another folder"
        )
    if largest >= manifest.vocab_size:
        raise UserError(
            f"{path} is a token file larger than the vocabulary: it has the id {largest:,}, the "
            f"tokenizer {manifest.vocab_size:,} ids; run ddl prepare into another folder"
        )


def _hash_and_largest(path: Path, dtype: np.dtype[Any]) -> tuple[str, int]:
    """Hex SHA-256 and largest id of a shard that holds a whole number of ids, in one pass."""
    digest = hashlib.sha256()
    largest = 0
    with path.open("rb") as file:
        while data := file.read(VERIFY_BYTES):
            digest.update(data)
            largest = max(largest, int(np.frombuffer(data, dtype).max()))
    return digest.hexdigest(), largest
