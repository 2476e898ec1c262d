"""The record of a prepared data folder: what its token shards hold and how they were made."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from deep_delta.data.files import write_json_atomically
from deep_delta.errors import UserError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
# To train on, to choose models and settings by, and to look at when everything is chosen. "test" is
# only there where it was asked for.
SPLITS = ("train", "val", "test")
# May lie beside a split's shards: for each document, in order, a line with the source it is of.
# Not in the manifest: people may take it away, or put their own there.
SOURCES_NAME = "{split}.sources.txt"


@dataclass(frozen=True)
class ShardInfo:
    """One shard: `tokens` little-endian ids in the file `name`, with the file's hex SHA-256."""

    name: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class SplitInfo:
    """One split. `tokens` counts one end-of-text token a document; `text_bytes` is UTF-8 text."""

    documents: int
    tokens: int
    text_bytes: int
    shards: tuple[ShardInfo, ...]


@dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json, which is written last: a folder with one is complete.

    dtype: "uint16" or "uint32", the type of the ids in the shards.
    vocab_size: largest id of the tokenizer plus one.
    eot_id: id of the token that follows each document.
    tokenizer_sha256: of the tokenizer.json in the same folder.
    settings: what `prepare` was asked for; a second run must ask for the same.
    empty_documents: how many documents were skipped because they hold only white space.
    splits: by name, "train", "val" and, where it was asked for, "test".
    """

    dtype: str
    vocab_size: int
    eot_id: int
    tokenizer_name: str
    tokenizer_sha256: str
    settings: dict[str, Any]
    empty_documents: int
    splits: dict[str, SplitInfo]
    format_version: int = FORMAT_VERSION

    def save(self, folder: Path) -> None:
        """Write manifest.json into `folder`, atomically."""
        write_json_atomically(folder / MANIFEST_NAME, asdict(self))

    def split(self, name: str, folder: Path) -> SplitInfo:
        """A split with tokens, by name. folder: the manifest's, for the error.

        Errors: UserError, naming the splits there are, when this one is missing or empty.
        """
        found = self.splits.get(name)
        if found is None or not found.tokens:
            others = [f'"{other}"' for other, info in self.splits.items() if info.tokens]
            raise UserError(
                f'{folder} has no tokens in the split "{name}", only in {" and ".join(others)}: '
                "--val-fraction and --test-fraction of ddl prepare say which it makes"
            )
        return found

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the manifest of a prepared folder.

        Errors: UserError when the folder is missing, has no manifest, or has one that this version
        can't read.
        """
        if not folder.is_dir():
            raise UserError(f"no such data folder: {folder}")
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise UserError(f"{folder} is not a prepared data folder: run ddl prepare")
        try:
            record = json.loads(path.read_bytes())
            version = record["format_version"]
            if version == FORMAT_VERSION:
                splits = {name: _split(split) for name, split in record.pop("splits").items()}
                return cls(splits=splits, **record)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} is damaged: delete {folder} and run ddl prepare") from error
        raise UserError(
            f"{path} has format version {version}, this version of ddl reads {FORMAT_VERSION}: "
            "run ddl prepare again into another folder"
        )


def _split(record: dict[str, Any]) -> SplitInfo:
    shards = tuple(ShardInfo(**shard) for shard in record["shards"])
    return SplitInfo(record["documents"], record["tokens"], record["text_bytes"], shards)
