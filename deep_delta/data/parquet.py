"""Parquet files, local or by URL: row groups as units of work, found from the file's footer."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from deep_delta.data.texts import SOURCE_FIELD, Document, document_of, missing_extra, one_line
from deep_delta.errors import UserError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

# A row group with more text is streamed by one process: whole, in each of many, it fills memory.
GROUP_BYTES = 16 * 1024 * 1024
# What is asked of the disk or the network at once; a usual row group's texts are smaller.
BUFFER_BYTES = 8 * 1024 * 1024
STREAM_ROWS = 256


@dataclass(frozen=True)
class RowGroup:
    """The rows `start` up to `stop` of a file, which all lie in its row group `number`.

    location: path or URL of the file.
    fingerprint: of the file.
    first: row with which the row group begins; rows count from 0 through the whole file.
    """

    location: str
    fingerprint: str
    number: int
    first: int
    start: int
    stop: int

    def documents(self) -> Iterator[Document]:
        """The documents in order. Errors: UserError, naming file and row (from 1)."""
        with _one_line_errors(self.location):
            file = _opened(self.location, self.fingerprint)
            row = self.first
            columns = [name for name in ("text", SOURCE_FIELD) if name in _columns(file)]
            for batch in file.iter_batches(STREAM_ROWS, row_groups=[self.number], columns=columns):
                fresh = batch[max(0, self.start - row) :]
                row += len(batch) - len(fresh)
                for record in fresh.to_pylist():
                    row += 1
                    yield document_of(record, f"{self.location}, row {row}")


def pieces(location: str, fingerprint: str, start: int) -> Iterator[Document | RowGroup]:
    """What a file holds from row `start` on: row groups to read, or the documents of a large one.

    location: path or URL. fingerprint: changes with the file's contents.
    Row groups before that row are not read. Errors: UserError for a file that can't be had or read,
    has no column "text", or for a missing extra.
    """
    with _one_line_errors(location):
        file = _opened(location, fingerprint)
        columns = _columns(file)
        if "text" not in columns:
            raise UserError(f'{location} has no column "text"')
        first = 0
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            stop = first + group.num_rows
            if start < stop:
                part = RowGroup(location, fingerprint, number, first, max(start, first), stop)
                small = group.column(columns.index("text")).total_uncompressed_size <= GROUP_BYTES
                yield from [part] if small else part.documents()
            first = stop


def _columns(file: "ParquetFile") -> list[str]:
    return [file.schema.column(index).path for index in range(len(file.schema))]


# A footer of a file of gigabytes has megabytes: it is read once, not for every row group.
@lru_cache(maxsize=1)
def _opened(location: str, fingerprint: str) -> "ParquetFile":
    """The open file; `fingerprint` only tells a replaced file from the one opened before."""
    from pyarrow.parquet import ParquetFile

    if "://" not in location:
        return ParquetFile(location, buffer_size=BUFFER_BYTES)
    from fsspec.core import url_to_fs

    file_system, path = url_to_fs(location)
    # fsspec's own reading ahead would fetch the other columns too.
    return ParquetFile(file_system.open(path, cache_type="none"), buffer_size=BUFFER_BYTES)


@contextmanager
def _one_line_errors(location: str) -> Iterator[None]:
    try:
        import pyarrow
    except ImportError as error:
        raise missing_extra(f"reading {location}") from error
    try:
        yield
    except UserError:
        raise
    except pyarrow.ArrowException as error:
        raise UserError(f"{location} is damaged: {one_line(error)}") from error
    except OSError as error:
        raise UserError(f"can't read {location}: {error.strerror or one_line(error)}") from error
    except Exception as error:
        if "://" not in location:
            raise
        # The network and the libraries above it raise dozens of kinds.
        raise UserError(f"can't read {location}: {one_line(error)}") from error
