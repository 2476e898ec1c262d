"""Floors of the house (docs: the design): a module imports only what lies below it."""

import ast
import subprocess
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
    "model": {"residual", "ops", "version"},
    "checkpoint": {"model", "data", "errors"},
    **{job: {"checkpoint", "model", "residual", "ops", *LEAVES} for job in JOBS},
    "compare": {"checkpoint", "model", "residual", "ops", *LEAVES, *JOBS},
    "study": {"checkpoint", "model", "residual", "ops", *LEAVES, *JOBS, "compare"},
    "cli": {"checkpoint", "model", "residual", "ops", *LEAVES, *JOBS, "compare", "study"},
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


KERNELS = [file for file in FILES if file.parent == PACKAGE / "ops" / "kernels"]


def distributions(*floors: str) -> set[str]:
    """What these floors import from outside the standard library, ourselves included.

    Without the Triton kernels: they are imported where they run.
    """
    files = [file for file in FILES if floor(file) in floors and file not in KERNELS]
    names = {name.split(".")[0] for file in files for name in imports(file)}
    return names - sys.stdlib_module_names


def test_the_delta_rule_needs_torch_only():
    assert distributions("ops") == {"torch", "deep_delta"}


def test_kernels_need_triton_only():
    """And one another: a kernel that imports torch, or the floor above it, is no kernel."""
    used = {name for file in KERNELS for name in imports(file)}
    outside = {name for name in used if not name.startswith("deep_delta.ops.kernels")}
    assert {name.split(".")[0] for name in outside} == {"triton"}


@pytest.mark.slow
def test_library_works_without_triton_and_imports_kernels_when_they_run():
    """Triton is optional. torch may import it for itself where it is installed."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, deep_delta, deep_delta.model, deep_delta.residual, deep_delta.ops\n"
        "one = [torch.ones(size) for size in ((2, 1), 2, 1, ())]\n"
        "print(deep_delta.delta_rewrite(*one, eps=0.0).flatten().tolist())\n"
        "print([n for n in sys.modules if n.startswith('deep_delta.ops.') and 'triton' in dir("
        "sys.modules[n])], 'deep_delta.ops.fused' in sys.modules)\n"
        "deep_delta.delta_rewrite(*one, backend='triton')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    # x = (1, 1) along h = (1, 1): k = h/√2 holds √2, the value is 1, and X becomes k.
    root, imported = run.stdout.splitlines()
    assert [round(number, 6) for number in ast.literal_eval(root)] == [0.707107] * 2
    assert imported == "[] False"
    assert run.stderr.splitlines()[-1].startswith("ValueError: backend 'triton' needs")


def test_files_are_short_enough_to_read():
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert lengths
    assert {str(file.relative_to(REPO)): n for file, n in lengths.items() if n >= 450} == {}


def test_core_needs_only_torch_and_transformers():
    """Importing the library must not need an extra; leaves and jobs may."""
    core = distributions("ops", "residual", "model", "deep_delta")
    core -= {"liger_kernel"}  # the extra `liger`, imported by the function that needs it
    core -= {"huggingface_hub", "packaging", "safetensors"}  # dependencies of transformers
    assert core == {"torch", "transformers", "deep_delta"}


@pytest.mark.parametrize("file", sorted((PACKAGE / "ops").rglob("*.py")), ids=str)
def test_kernels_wait_for_nobody(file):
    """No thread and no process compiles for a launch, which one training in 41 then waited for."""
    starts = {"threading", "concurrent", "multiprocessing", "subprocess", "asyncio"}
    assert not {name.split(".")[0] for name in imports(file)} & starts
