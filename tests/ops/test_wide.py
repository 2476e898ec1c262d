"""The backward pass of states too wide for the registers, on small ones that are sent there."""

import pytest
import torch
from fused_cases import Case, can_run, chain, measure, right, same

from deep_delta.ops import apply_write, launch

pytest.importorskip("triton", reason="the fused kernels need triton")
pytestmark = can_run


@pytest.fixture(autouse=True)
def launched(monkeypatch) -> list[str]:
    """Sends every state with channels there; the names of the kernels that have run."""
    from deep_delta.ops import fused, fused_launch

    names: list[str] = []

    def start(kernel, *arguments):
        names.append(kernel.__name__)
        launch.start(kernel, *arguments)

    monkeypatch.setattr(fused_launch, "WIDE", 0)
    monkeypatch.setattr(fused, "start", start)
    return names


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(channels=2, gates=2),
        Case(channels=2, width=1100, batch=1, tokens=2),
        Case("write-only", channels=2),
        Case("plain", channels=2),
        Case(None, channels=2),
        Case("delta, no length", channels=2, value_on_state=False),
    ],
    ids=str,
)
def test_read_is_the_reference(case, launched):
    right(case.read, case.tensors())
    assert launched[-2:] == ["wide_backward", "weights_backward"]


@pytest.mark.parametrize("write", [None, "delta"])
def test_last_read_is_the_reference(write, launched):
    case = Case(write, channels=2)
    right(case.reduce, case.tensors())
    assert launched[-2:] == ["wide_backward", "weights_backward"]


def test_settled_write_is_the_reference(launched):
    case = Case(channels=2, gates=0, values=False, taps=None)
    tensors = case.tensors()
    del tensors["norm_weight"]

    def settle(backend, state, direction, target, erase):
        eps = case.fixed()["eps"]
        return (apply_write(state, direction, target, erase, eps=eps, backend=backend),)

    right(settle, tensors)
    assert launched[-1] == "wide_backward"


@pytest.mark.parametrize("processors", [1, 3])
def test_tokens_need_not_divide_among_programs(processors, monkeypatch):
    monkeypatch.setattr(launch, "processors", lambda device: processors)
    case = Case(channels=2, batch=1, tokens=5)
    right(case.read, case.tensors())


@pytest.mark.slow
def test_gradients_from_rebuilt_states_are_those_from_kept_ones(launched):
    """Bit for bit."""
    expected = chain(0, torch.float32, 1, True, [])
    same(chain(2, torch.float32, 1, True, []), expected)
    assert launched.count("wide_backward") == 12


@pytest.mark.slow
def test_half_precision_is_the_reference_and_two_runs_agree():
    case = Case(channels=2)
    right(case.read, case.tensors(), torch.float16)
    same(*(measure(case.read, case.tensors(), "triton") for _ in range(2)))


def test_one_channel_and_a_window_stay_with_the_other_kernel(launched):
    for case in (Case(channels=1, taps=None), Case(channels=2, taps=2)):
        right(case.read, case.tensors())
    assert not {"wide_backward", "weights_backward"} & set(launched)
