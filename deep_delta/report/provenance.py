"""What a report says of how it was made: the commit, the versions and the hardware."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]


def commit() -> str | None:
    """The commit of this checkout, with "-dirty" if its source was changed since.

    The variable DDL_COMMIT says it instead where a machine gets a copy of the files, with no
    repository or an older one around them. None without both.
    """
    if given := os.environ.get("DDL_COMMIT"):
        return given
    try:
        if Path(_git("rev-parse", "--show-toplevel")) != REPOSITORY:
            return None  # the files lie inside another project's repository
        head = _git("rev-parse", "--short=12", "HEAD")
        # Results may be files of the repository: that they grow makes no number doubtful.
        changed = _git("status", "--porcelain", "--", "deep_delta", "deep_delta_*.py")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changed else head


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def versions(*packages: str) -> dict[str, str]:
    """The versions of Python, of this library and of those of ``packages`` that are installed."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("deep-delta-learning", *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware(gpus: int = 1) -> str:
    """What computes, in words: a GPU's name, with how many where there are several, or the CPU."""
    if not torch.cuda.is_available():
        return f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name()
    return name if gpus == 1 else f"{gpus} × {name}"
