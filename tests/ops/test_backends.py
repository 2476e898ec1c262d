"""Which implementation runs: named ones never fall back, and "auto" goes by the device."""

import pytest
import torch
from helpers import one_line_error

from deep_delta import delta_rewrite, ops
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


WRONG = [
    ("direction", {"direction": torch.ones(2, 3, 6)}),
    ("target", {"target": torch.ones(2, 3, 4)}),
    ("erase", {"erase": torch.ones(2, 3, 1)}),
    ("kernel", {"kernel": torch.ones(1, 5, 2)}),
    ("needs a kernel", {"kernel": None}),
    ("norm_weight", {"norm_weight": torch.ones(4)}),
    ("norm_weight has shape (3, 5)", {"norm_weight": torch.ones(3, 5)}),
    ("gate_weight", {"gate_weight": torch.ones(1, 4)}),
    ("gate_weight has shape (5,)", {"gate_weight": torch.ones(5)}),
    ("value_weight", {"value_weight": torch.ones(5)[None, :3]}),
    ("segments", {"segments": torch.zeros(2, 4)}),
    ("(B, T, d, d_v)", {"state": torch.ones(3, 5, 2)}),
]


@pytest.mark.parametrize(("said", "wrong"), WRONG, ids=[said for said, _ in WRONG])
def test_a_read_refuses_shapes_that_do_not_fit_in_one_line(said, wrong):
    """A kernel would go on and read somebody else's memory."""
    shapes = {
        "state": (2, 3, 5, 2), "direction": (2, 3, 5), "target": (2, 3, 2), "erase": (2, 3),
        "kernel": (1, 2, 5), "norm_weight": (5,), "gate_weight": (1, 5), "value_weight": (2, 5),
    }  # fmt: skip
    arguments = {name: torch.ones(shape) for name, shape in shapes.items()} | wrong
    if said == "(B, T, d, d_v)":
        arguments |= {"direction": None, "target": None, "erase": None}
    one_line_error(lambda: ops.read_state(**arguments, norm_eps=1e-5), said)


def test_an_expansion_refuses_a_kernel_of_another_width():
    one_line_error(lambda: ops.expand_embeddings(torch.ones(2, 3, 5), torch.ones(4, 2, 3)), "fit")


def test_an_expansion_refuses_documents_of_other_tokens():
    embeddings, kernel, segments = torch.ones(2, 3, 5), torch.ones(5, 2, 3), torch.zeros(2, 4)
    one_line_error(lambda: ops.expand_embeddings(embeddings, kernel, segments), "segments", "fit")
