"""Which implementation runs: named ones never fall back, and "auto" goes by the device."""

import pytest
import torch
from helpers import one_line_error

from deep_delta import delta_rewrite
from deep_delta.ops import BACKENDS, dispatch, resolve_backend

STATE = torch.ones(2, 3)
ARGUMENTS = (STATE, torch.ones(2), torch.ones(3), torch.tensor(1.0))


def test_backends_are_named():
    assert BACKENDS == ("auto", "reference", "triton")


def test_unknown_backend_is_one_line_and_never_falls_back():
    one_line_error(lambda: delta_rewrite(*ARGUMENTS, backend="cuda-magic"), "cuda-magic", "auto")
    one_line_error(lambda: resolve_backend(""), *BACKENDS)


@pytest.fixture
def world(monkeypatch):
    """A function that says whether triton is installed, and whether its interpreter is on."""

    def make(installed: bool, interpreted: bool) -> None:
        monkeypatch.setattr(dispatch, "HAS_TRITON", installed)
        monkeypatch.setattr(dispatch, "INTERPRETED", interpreted)

    return make


@pytest.mark.parametrize("interpreted", [True, False])
@pytest.mark.parametrize("installed", [True, False])
def test_auto_is_the_reference_on_a_cpu_whatever_else_could_run(installed, interpreted, world):
    world(installed, interpreted)
    assert resolve_backend("auto", STATE) == "reference"
    assert resolve_backend("reference", STATE) == "reference"


def test_triton_by_name_needs_triton(world):
    world(installed=False, interpreted=True)
    one_line_error(lambda: delta_rewrite(*ARGUMENTS, backend="triton"), "needs", "triton", "pip")
    one_line_error(lambda: resolve_backend("triton"), "needs", "pip")  # before any tensor is known


def test_triton_by_name_on_a_cpu_runs_in_the_interpreter_only(world):
    world(installed=True, interpreted=True)
    assert resolve_backend("triton", STATE) == "triton"
    world(installed=True, interpreted=False)
    one_line_error(lambda: delta_rewrite(*ARGUMENTS, backend="triton"), "CUDA", "'cpu'", "auto")


def test_triton_by_name_takes_no_fp64(world):
    world(installed=True, interpreted=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert resolve_backend("triton", STATE.to(dtype)) == "triton"
    one_line_error(lambda: resolve_backend("triton", STATE.double()), "torch.float64", "fp32")
