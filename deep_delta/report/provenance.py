"""What a report says of the code that made it: the commit and the versions."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def commit() -> str | None:
    """The commit of a checkout of this library, with "+" for uncommitted changes; else None."""
    checkout = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        command = ["git", "-C", str(checkout), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != checkout:
            return None  # installed somewhere inside another project's repository
        return git("describe", "--always", "--dirty=+", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return None


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python, of this library and of those of ``packages`` that are installed."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("deep-delta-learning", *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
