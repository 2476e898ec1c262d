"""Data sets by name, through `datasets`: which files they have, and the rows of any of them."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from deep_delta.data.files import file_fingerprint
from deep_delta.data.texts import Document, document_of, missing_extra, one_line
from deep_delta.errors import UserError

if TYPE_CHECKING:
    from datasets import DatasetBuilder

SPLIT = "train"


class DataFile(NamedTuple):
    """A file of a data set.

    name: its path in the data set.
    fingerprint: of its contents: equal in every revision that holds the same file.
    location: its path, or a URL that names the revision.
    """

    name: str
    fingerprint: str
    location: str


def data_files(data_set: str) -> list[DataFile]:
    """The files of the split "train", in order. data_set: `NAME` or `NAME:CONFIGURATION`.

    Errors: UserError for a data set or configuration that can't be had, one without files, or a
    missing extra.
    """
    builder = _builder(data_set)
    try:
        files = (builder.config.data_files or {}).get(SPLIT, [])
        found = [_data_file(str(file), f"{builder.base_path}/") for file in files]
    except Exception as error:  # the library and the network below it raise dozens of kinds
        raise _cannot_load(data_set, error) from error
    if not found:
        raise UserError(f'the data set {data_set} has no files for the split "{SPLIT}"')
    return found


def rows(data_set: str, start: int) -> Iterator[Document]:
    """The documents of a data set of any kind from row `start` on; those before may be read again.

    Errors: UserError like `data_files`, or for a row without text.
    """
    builder = _builder(data_set)
    try:
        stream = builder.as_streaming_dataset(split=SPLIT).skip(start)
        for number, row in enumerate(stream, start=start + 1):
            yield document_of(row, f"data set {data_set}, row {number}")
    except UserError:
        raise
    except Exception as error:
        raise _cannot_load(data_set, error) from error


def _builder(data_set: str) -> "DatasetBuilder":
    try:
        import datasets
    except ImportError as error:
        raise missing_extra(f"loading the data set {data_set}") from error
    name, _, configuration = data_set.partition(":")
    try:
        return datasets.load_dataset_builder(name, configuration or None)
    except Exception as error:
        raise _cannot_load(data_set, error) from error


def _cannot_load(data_set: str, error: Exception) -> UserError:
    return UserError(f"can't load the data set {data_set}: {one_line(error)}")


def _data_file(location: str, base: str) -> DataFile:
    name = location.removeprefix(base)
    if "://" not in location:
        return DataFile(name, file_fingerprint(location), location)
    from fsspec.core import url_to_fs

    file_system, path = url_to_fs(location)
    info = file_system.info(path)
    # Git's hash of the file (or of the pointer to it, which holds a hash of the contents): a new
    # revision that leaves the file alone does not stop an interrupted run from going on.
    fingerprint = info.get("blob_id") or f"{location} {info.get('size')}"
    return DataFile(name, fingerprint, location)
