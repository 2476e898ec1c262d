"""What a machine can do, by its name, and peak memory against known allocations."""

import gc
import time

import pytest
import torch

from deep_delta import accounting
from deep_delta.accounting import PeakMemory, peak_flops

MIB = 2**20


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA B200", 2250),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)
def test_peak_of_a_gpu(name, tera):
    assert peak_flops(name) == tera * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "X",
        "",
        "NVIDIA GH200 480GB",
        "NVIDIA GB200",
        "NVIDIA H20",
        "NVIDIA H800",
        "NVIDIA L40",
        "NVIDIA A100X",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM4-80GB MIG 3g.40gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA RTX 6000 Ada Generation",
        "CPU (x86_64), 2 threads",
    ],
)
def test_peak_of_another_device_is_not_made_up(name):
    assert peak_flops(name) is None


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


class Allocator:
    """The four functions of torch.cuda that count what tensors take, without a GPU."""

    def __init__(self):
        self.allocated = self.peak = 0

    def allocate(self, size: int) -> None:
        self.allocated += size
        self.peak = max(self.peak, self.allocated)

    def is_available(self) -> bool:
        return True

    def memory_allocated(self) -> int:
        return self.allocated

    def max_memory_allocated(self) -> int:
        return self.peak

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.allocated


@pytest.fixture
def allocator(monkeypatch):
    allocator = Allocator()
    for name in (
        "is_available",
        "memory_allocated",
        "max_memory_allocated",
        "reset_peak_memory_stats",
    ):
        monkeypatch.setattr(accounting.torch.cuda, name, getattr(allocator, name))
    return allocator


def test_on_a_gpu_the_memory_of_a_run_is_without_what_earlier_ones_left(allocator):
    allocator.allocate(9)
    allocator.allocate(-4)  # an earlier run's peak is 9, and it leaves 5
    with PeakMemory() as memory:
        allocator.allocate(3)
        allocator.allocate(-2)
    assert memory.bytes == 3


def test_an_earlier_model_that_waits_for_the_collector_hides_nothing(allocator):
    """Collected inside, its memory would be taken for the run's own, which then looks free."""

    class Model:
        def __init__(self):
            self.trainer = self  # as a model and what trains it hold each other
            allocator.allocate(5)

        def __del__(self):
            allocator.allocate(-5)

    gc.disable()
    try:
        Model()
        assert allocator.allocated == 5
        with PeakMemory() as memory:
            gc.collect()
            allocator.allocate(3)
    finally:
        gc.enable()
    assert memory.bytes == 3
