"""Rows of results: printed as they come, appended to a CSV, shown as one table at the end."""

import csv
import difflib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deep_delta.errors import UserError
from deep_delta.report.provenance import commit, hardware, versions

ENVIRONMENT = ("date", "commit", "command", "device", "torch", "triton", "transformers")
MEASURED = (
    "level", "name", "provider", "pass", "timing", "settings", "dtype", "ms", "bytes",
    "share_of_copy", "copy_gb_per_s", "tokens_per_s", "ratio", "peak_gib", "peak_ratio", "mfu",
    "host_ms", "first_step_s", "status",
)  # fmt: skip
COLUMNS = (*ENVIRONMENT, *MEASURED)  # benchmarks/README.md says what each one means
OK = "ok"


def environment(command: str) -> dict[str, str]:
    """Where and with what a row is measured: the columns ENVIRONMENT."""
    packages = ("torch", "triton", "transformers")
    installed = versions(*packages)
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {
        "date": date,
        "commit": commit() or "unknown",
        "command": command,
        "device": hardware(),
        **{name: installed.get(name, "") for name in packages},
    }


class Record:
    """The rows of one benchmark. `failed` tells whether any of them holds no figures.

    Args:
        command: the command that measures, for the CSV.
        path: the CSV to append to; None for none.

    Raises:
        UserError: the CSV cannot be written, or is a file with other columns.
    """

    def __init__(self, command: str, path: Path | None = None):
        self.path, self.failed = path, False
        self.environment = environment(command)
        if path is not None:
            _begin(path)

    def add(self, line: str, **row: Any) -> None:
        """Print `line` and append the row, whose keys are among MEASURED."""
        status = row.setdefault("status", OK)
        self.failed |= status != OK
        print(line if status == OK else f"{line}: {status}", flush=True)
        if self.path is not None:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, COLUMNS).writerow({**self.environment, **row})


def _begin(path: Path) -> None:
    """Write the header of a new CSV, or see that an old one has the same columns."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", newline="", encoding="utf-8") as file:
            file.seek(0)
            header = next(csv.reader(file), None)
            if header is None:
                csv.writer(file).writerow(COLUMNS)
    except OSError as error:
        raise UserError(f"--csv {path} cannot be written: {error.strerror}") from None
    if header is not None and tuple(header) != COLUMNS:
        raise UserError(f"{path} has other columns than this version writes: name a new file")


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows with the same keys as an aligned Markdown table, ending in a newline."""
    names = list(rows[0])
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    lines = [
        [name.ljust(widths[name]) for name in names],
        ["-" * widths[name] for name in names],
        *([row[name].ljust(widths[name]) for name in names] for row in rows),
    ]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def chosen(option: str, names: Sequence[str], known: Sequence[str]) -> list[str]:
    """The names without repeats, in their order; UserError for one that is not known."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"{option}: unknown {name!r}; {hint}known: {', '.join(known)}")
    return list(dict.fromkeys(names))
