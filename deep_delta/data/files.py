"""Small file helpers that the data modules share: hashing and durable, atomic writes."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from deep_delta.errors import UserError

FINGERPRINT_BYTES = 64 * 1024


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_fingerprint(path: Path | str) -> str:
    """Hex SHA-256 of size, head and tail: a whole hash would read terabytes before any work.

    Errors: UserError for an unreadable file.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest = hashlib.sha256(str(size).encode())
            file.seek(0)
            digest.update(file.read(FINGERPRINT_BYTES))
            file.seek(max(0, size - FINGERPRINT_BYTES))
            digest.update(file.read())
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from error
    return digest.hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, so that after a crash it holds the old bytes or the new ones.

    Errors: OSError as the file system gives it; the temporary file is then removed.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_json_atomically(path: Path, value: Any) -> None:
    """Like `write_atomically`, for a JSON value."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def publish_folder(staged: Path, target: Path) -> None:
    """Rename a folder with files to `target`, which is then whole, also after a power failure.

    A target that is there already is replaced. Errors: OSError as the file system gives it.
    """
    for path in staged.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            fsync_folder(path)
    fsync_folder(staged)
    if target.exists():
        shutil.rmtree(target)
    staged.rename(target)
    fsync_folder(target.parent)


def fsync_folder(folder: Path) -> None:
    """Make new and renamed entries of `folder` durable; a no-op where folders can't be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows refuses to open a folder
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
