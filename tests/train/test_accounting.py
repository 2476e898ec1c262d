"""The peak of a GPU by its name, and peak memory against a known allocation."""

import time

import pytest
import torch

from deep_delta.accounting import PeakMemory, peak_flops

MIB = 2**20


@pytest.mark.parametrize(
    ("name", "most"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4", 312e12), ("X", None)]
)
def test_peak_of_a_gpu(name, most):
    assert peak_flops(name) == most


def test_peak_memory_sees_what_was_allocated_inside_and_freed():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with PeakMemory() as memory:
        block = torch.ones(64 * MIB // 4, device=device)
        time.sleep(0.1)  # the memory of a CPU is sampled every 10 ms
        del block
    assert 62 * MIB < memory.bytes < 96 * MIB


def test_peak_memory_of_nothing_is_almost_nothing():
    with PeakMemory() as memory:
        time.sleep(0.03)
    assert memory.bytes < 16 * MIB
