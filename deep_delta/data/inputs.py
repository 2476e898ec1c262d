"""Where documents come from: text files of several kinds, folders of them, or a hub data set."""

import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from deep_delta.errors import UserError

FINGERPRINT_BYTES = 64 * 1024


@dataclass(frozen=True)
class Source:
    """One input: a file, or a data set by name.

    name: what people see; for a file found in a folder, its path from that folder.
    fingerprint: equal for equal inputs, wherever they lie; recorded to notice a changed input.
    path: the file, or None for a data set.
    """

    name: str
    fingerprint: str
    path: Path | None

    def documents(self, start: int = 0) -> Iterator[str]:
        """Texts in order, from document `start` on, whitespace-only ones included.

        Errors: UserError for an unreadable file or record (naming file and line), a data set that
        can't be had, or a missing extra.
        """
        if self.path is None:
            return _dataset_documents(self.name, start)
        read = READERS[_kind(self.path)]
        return itertools.islice(_with_read_errors(self.path, read), start, None)


def find_sources(inputs: list[str]) -> list[Source]:
    """Resolve file, folder and data set names; the files of a folder in sorted order.

    Errors: UserError for no inputs, a missing file, a kind of file that can't be read, or a folder
    without any readable file.
    """
    if not inputs:
        raise UserError("no input given: name text files, folders or a data set")
    return [source for name in inputs for source in _sources_of(name)]


def looks_like_path(name: str) -> bool:
    """Whether a name that doesn't exist was meant as a path: it has a suffix or starts as one."""
    if name.endswith(("/", "\\")):
        return True
    return name.startswith(("./", "../", "/", "~", ".\\", "..\\")) or bool(
        # Letters first: a data set name may end in a version, such as "-v1.0".
        re.search(r"\.[A-Za-z][A-Za-z0-9]*$", name)
    )


def _sources_of(name: str) -> list[Source]:
    path = Path(name)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file))
        if not files:
            raise UserError(f"no readable file in {path}: it needs one of {', '.join(READERS)}")
        return [_file_source(file, file.relative_to(path).as_posix()) for file in files]
    if path.is_file():
        if not _kind(path):
            raise UserError(f"can't read {path}: it must be one of {', '.join(READERS)}")
        return [_file_source(path, path.name)]
    if looks_like_path(name):
        raise UserError(f"no such file or folder: {name}")
    return [Source(name, fingerprint=f"dataset:{name}", path=None)]


def _kind(path: Path) -> str:
    """The key in READERS that the file name ends with, or "" when there is none."""
    return next((suffix for suffix in READERS if path.name.lower().endswith(suffix)), "")


def _file_source(path: Path, name: str) -> Source:
    """Fingerprint by size, head and tail: a whole hash would read terabytes before any work."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest = hashlib.sha256(str(size).encode())
            file.seek(0)
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(0, size - FINGERPRINT_BYTES))
            digest.update(file.read())
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error
    return Source(name, digest.hexdigest(), path)


def _with_read_errors(path: Path, read: Callable[[Path], Iterator[str]]) -> Iterator[str]:
    """The texts of `read(path)`, with what a damaged or unreadable file raises as a UserError."""
    try:
        yield from read(path)
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror or one_line(error)}") from error


def _read_txt(path: Path) -> Iterator[str]:
    try:
        yield path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error


def _read_jsonl(path: Path, stream: BinaryIO) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield _text_of(line, f"{path}, line {number}")


def _text_of(line: bytes, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:  # also bytes that are not UTF-8
        raise UserError(f"{where}: not a JSON object") from error
    return _checked_text(record.get("text") if isinstance(record, dict) else None, where)


def _checked_text(text: object, where: str) -> str:
    if not isinstance(text, str):
        raise UserError(f'{where}: the record has no "text" string')
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise UserError(f"{where}: the text is not valid Unicode (a lone surrogate)")
    return text


def _read_plain_jsonl(path: Path) -> Iterator[str]:
    with path.open("rb") as stream:
        yield from _read_jsonl(path, stream)


def _read_gz(path: Path) -> Iterator[str]:
    with gzip.open(path, "rb") as stream:
        yield from _read_jsonl(path, cast(BinaryIO, stream))


def _read_xz(path: Path) -> Iterator[str]:
    with lzma.open(path, "rb") as stream:
        yield from _read_jsonl(path, cast(BinaryIO, stream))


def _read_zst(path: Path) -> Iterator[str]:
    try:
        import zstandard
    except ImportError as error:
        raise missing_extra(f"reading {path.name}") from error
    with path.open("rb") as file:
        decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)  # files made with --long
        try:
            # Tools that append, or compress in parallel, write several frames to one file.
            with decompressor.stream_reader(file, read_across_frames=True) as stream:
                yield from _read_jsonl(path, cast(BinaryIO, io.BufferedReader(cast(Any, stream))))
        except zstandard.ZstdError as error:
            raise UserError(f"{path} is damaged: {error}") from error


def _read_parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise missing_extra(f"reading {path.name}") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                raise UserError(f'{path} has no column "text"')
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield _checked_text(text, f"{path}, row {number}")
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from error


def _dataset_documents(name: str, start: int) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise missing_extra(f"loading the data set {name}") from error
    try:
        rows = datasets.load_dataset(name, split="train", streaming=True).skip(start)
        for number, row in enumerate(rows, start=start + 1):
            yield _checked_text(row.get("text"), f"data set {name}, row {number}")
    except UserError:
        raise
    except Exception as error:  # the library and the network below it raise dozens of kinds
        raise UserError(f"can't load the data set {name}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """First line of an error's message, or its type when it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def missing_extra(what: str) -> UserError:
    """The error for a package of the extra 'train' that is not installed."""
    return UserError(f"{what} needs the extra 'train': pip install 'deep-delta-learning[train]'")


# By the end of the file name.
READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_plain_jsonl,
    ".jsonl.gz": _read_gz,
    ".jsonl.zst": _read_zst,
    ".jsonl.xz": _read_xz,
    ".parquet": _read_parquet,
}
