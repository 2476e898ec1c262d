"""What a machine can do, by its name, and peak memory against a known allocation."""

import time

import pytest
import torch

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
