"""What a machine can do and what a run takes of it: peak speed and peak memory. A leaf."""

import contextlib
import ctypes
import threading
import time

import psutil
import torch

# Dense bf16 matrix products, FLOP/s, by the makers' data sheets.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its name; None for one that is not in PEAK_FLOPS."""
    return next((most for name, most in PEAK_FLOPS.items() if name in device_name), None)


class PeakMemory:
    """Context manager: `bytes` is the highest memory use inside, over what was there before.

    On a GPU that is the allocator's peak. On a CPU it is the growth of the process's resident
    memory, sampled every 10 ms, after memory that earlier work freed went back to the system.
    """

    bytes: int = 0

    def __enter__(self) -> "PeakMemory":
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return self
        _return_freed_memory()
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def _sample(self) -> None:
        while not self._stop.is_set():
            self.bytes = max(self.bytes, self._process.memory_info().rss - self._before)
            time.sleep(0.01)

    def __exit__(self, *exc: object) -> None:
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated()
            return
        self._stop.set()
        self._sampler.join()


def _return_freed_memory() -> None:
    # Without glibc the growth is measured from a little higher up.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
