"""What a machine can do and what a run takes of it: peak speed and peak memory. A leaf."""

import contextlib
import ctypes
import gc
import re
import threading
import time

import psutil
import torch

# FLOP/s of dense bf16 matrix products that are summed in fp32, by NVIDIA's data sheets. Most give
# them with sparsity only, which is twice as much: those are in brackets, in TFLOP/s. The sheets of
# A10G and RTX 6000 Ada do not settle it, so they are left out.
PEAK_FLOPS = {
    "B200": 2250e12,  # HGX B200, a single GPU (4,500)
    "H200": 989e12,  # H200, column SXM (1,979)
    "H200 NVL": 835e12,  # H200, column NVL (1,671)
    "H100 HBM3": 989e12,  # H100, column SXM (1,979)
    "H100 NVL": 835e12,  # H100, column NVL (1,671)
    "H100 PCIe": 756e12,  # H100, column PCIe (1,513)
    "A100 SXM4": 312e12,  # A100
    "A100 PCIe": 312e12,  # A100
    "L40S": 362e12,  # L40S
    "L4": 121e12,  # L4 (242)
    "RTX 4090": 165e12,  # Ada architecture white paper, appendix A
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its name, as `torch.cuda.get_device_name` gives it.

    All words must be those of PEAK_FLOPS, but for the maker and the size of the memory: a slice of
    a GPU, or one for laptops, is another one. None for a name that is not there.
    """
    words = [
        word
        for word in re.split("[ -]", device_name.replace("PCIE", "PCIe"))
        if not re.fullmatch(r"NVIDIA|GeForce|\d+GB", word)
    ]
    return PEAK_FLOPS.get(" ".join(words))


class PeakMemory:
    """Context manager: `bytes` is the highest memory use inside, over what was there before.

    On a GPU it is what tensors take in torch's allocator, on the current device. On a CPU it is
    the growth of the process's resident memory, sampled every 10 ms, after memory that earlier
    work freed went back to the system.
    """

    bytes: int = 0

    def __enter__(self) -> "PeakMemory":
        # An earlier model that waits for the collector would go, unseen, while this one grows.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        _return_freed_memory()
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def so_far(self) -> int:
        """The highest memory use inside until now."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() - self._before
        return self.bytes

    def _sample(self) -> None:
        while not self._stop.is_set():
            self.bytes = max(self.bytes, self._process.memory_info().rss - self._before)
            time.sleep(0.01)

    def __exit__(self, *exc: object) -> None:
        self.bytes = self.so_far()
        if torch.cuda.is_available():
            return
        self._stop.set()
        self._sampler.join()


def _return_freed_memory() -> None:
    # Without glibc the growth is measured from a little higher up.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
