"""Floors of the house (docs: the design): a module imports only what lies below it."""

import ast
import sys
from pathlib import Path

import pytest
from helpers import REPO

PACKAGE = REPO / "deep_delta"
FILES = sorted(PACKAGE.rglob("*.py"))

# What a floor may import of deep_delta, beside itself. Floors that do not exist yet may be here.
LEAVES = {"data", "report", "accounting", "errors", "version"}
JOBS = {"train", "evaluate", "audit", "bench"}
ALLOWED: dict[str, set[str]] = {
    "ops": set(),
    "errors": set(),
    "version": set(),
    "data": {"errors"},
    "report": {"errors"},
    "accounting": {"errors"},
    "residual": {"ops"},
    "model": {"residual", "ops"},
    **{job: {"model", "residual", "ops", *LEAVES} for job in JOBS},
    "compare": {"model", "residual", "ops", *LEAVES, *JOBS},
    "study": {"model", "residual", "ops", *LEAVES, *JOBS, "compare"},
    "cli": {"model", "residual", "ops", *LEAVES, *JOBS, "compare", "study"},
    "deep_delta": {"model", "residual", "ops", "version"},  # the package's own __init__
}


def floor(file: Path) -> str:
    """The name of a file's floor: its folder, or its own name at the top of the package."""
    relative = file.relative_to(PACKAGE)
    name = relative.parts[0].removesuffix(".py")
    return "deep_delta" if name == "__init__" else name


def imports(file: Path) -> set[str]:
    """Every module that a file imports, also inside its functions, relative ones resolved."""
    package = ["deep_delta", *file.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from deep_delta import ops` imports deep_delta.ops, as far as floors go.
            deeper = module in ("deep_delta", ".".join(package)) and module.count(".") == 0
            found |= {f"{module}.{a.name}" for a in node.names} if deeper else {module}
    return found


def floors_used(file: Path) -> set[str]:
    ours = {name for name in imports(file) if name.split(".")[0] == "deep_delta"}
    return {name.split(".")[1] if "." in name else "deep_delta" for name in ours} - {floor(file)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_only_what_lies_below(file):
    assert floor(file) in ALLOWED, f"{floor(file)} is a new floor: give it a place in ALLOWED"
    assert floors_used(file) <= ALLOWED[floor(file)]


def distributions(*floors: str) -> set[str]:
    """What these floors import from outside the standard library, ourselves included."""
    names = {
        name.split(".")[0] for file in FILES if floor(file) in floors for name in imports(file)
    }
    return names - sys.stdlib_module_names


def test_the_delta_rule_needs_torch_only():
    assert distributions("ops") == {"torch", "deep_delta"}


def test_files_are_short_enough_to_read():
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert lengths
    assert {str(file.relative_to(REPO)): n for file, n in lengths.items() if n >= 450} == {}


def test_core_needs_only_torch_and_transformers():
    """Importing the library must not need an extra; leaves and jobs may."""
    core = distributions("ops", "residual", "model", "deep_delta")
    # huggingface_hub and safetensors are dependencies of transformers.
    assert core == {"torch", "transformers", "huggingface_hub", "safetensors", "deep_delta"}
