"""Where documents come from: text files of several kinds, folders of them, or a hub data set."""

import gzip
import hashlib
import io
import itertools
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from deep_delta.data import parquet
from deep_delta.data.files import file_fingerprint
from deep_delta.data.hub import data_files, rows
from deep_delta.data.parquet import RowGroup
from deep_delta.data.texts import Document, document_of, missing_extra, one_line
from deep_delta.errors import UserError


@dataclass(frozen=True)
class Source:
    """One input: a file, or a data set that is read row by row.

    name: what people see; for a file found in a folder or data set, its path from there.
    fingerprint: equal for equal inputs, wherever they lie; recorded to notice a changed input.
    pieces: from a document's number (from 0) to those from there on, whitespace-only ones
        included, or row groups that hold them. Errors: UserError for an unreadable file or record
        (naming file and line), or a missing extra.
    """

    name: str
    fingerprint: str
    pieces: Callable[[int], Iterator[Document | RowGroup]]


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
            raise UserError(f"no readable file in {path}: it needs one of {', '.join(KINDS)}")
        return [_file_source(file, file.relative_to(path).as_posix()) for file in files]
    if path.is_file():
        if not _kind(path):
            raise UserError(f"can't read {path}: it must be one of {', '.join(KINDS)}")
        return [_file_source(path, path.name)]
    if looks_like_path(name):
        raise UserError(f"no such file or folder: {name}")
    return _data_set_sources(name)


def _data_set_sources(name: str) -> list[Source]:
    """The parquet files of a data set, or the data set as one source when it has others."""
    files = data_files(name)
    if all(file.location.endswith(".parquet") for file in files):
        return [
            Source(
                f"{name}/{file.name}",
                file.fingerprint,
                partial(parquet.pieces, file.location, file.fingerprint),
            )
            for file in files
        ]
    fingerprints = " ".join(file.fingerprint for file in files)
    return [Source(name, hashlib.sha256(fingerprints.encode()).hexdigest(), partial(rows, name))]


def _kind(path: Path) -> str:
    """Which of KINDS the file name ends with, or "" when there is none."""
    return next((suffix for suffix in KINDS if path.name.lower().endswith(suffix)), "")


def _file_source(path: Path, name: str) -> Source:
    fingerprint = file_fingerprint(path)
    kind = _kind(path)
    if kind == PARQUET:
        return Source(name, fingerprint, partial(parquet.pieces, str(path), fingerprint))
    return Source(name, fingerprint, partial(_documents, path, READERS[kind]))


def _documents(
    path: Path, read: Callable[[Path], Iterator[Document]], start: int
) -> Iterator[Document]:
    return itertools.islice(_with_read_errors(path, read), start, None)


def _with_read_errors(path: Path, read: Callable[[Path], Iterator[Document]]) -> Iterator[Document]:
    """Those of `read(path)`, with what a damaged or unreadable file raises as a UserError."""
    try:
        yield from read(path)
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror or one_line(error)}") from error


def _read_txt(path: Path) -> Iterator[Document]:
    try:
        yield Document(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start})") from error


def _read_jsonl(path: Path, stream: BinaryIO) -> Iterator[Document]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield _document_of(line, f"{path}, line {number}")


def _document_of(line: bytes, where: str) -> Document:
    try:
        record = json.loads(line)
    except ValueError as error:  # also bytes that are not UTF-8
        raise UserError(f"{where}: not a JSON object") from error
    return document_of(record, where)


def _read_plain_jsonl(path: Path) -> Iterator[Document]:
    with path.open("rb") as stream:
        yield from _read_jsonl(path, stream)


def _read_gz(path: Path) -> Iterator[Document]:
    with gzip.open(path, "rb") as stream:
        yield from _read_jsonl(path, cast(BinaryIO, stream))


def _read_xz(path: Path) -> Iterator[Document]:
    with lzma.open(path, "rb") as stream:
        yield from _read_jsonl(path, cast(BinaryIO, stream))


def _read_zst(path: Path) -> Iterator[Document]:
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


# By the end of the file name.
READERS: dict[str, Callable[[Path], Iterator[Document]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_plain_jsonl,
    ".jsonl.gz": _read_gz,
    ".jsonl.zst": _read_zst,
    ".jsonl.xz": _read_xz,
}
PARQUET = ".parquet"
KINDS = (*READERS, PARQUET)
