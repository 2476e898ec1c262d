"""Settings for every test: one thread a process (the suite runs two), and settled randomness."""

import functools
import gc
import os

import pytest
import torch

try:
    from hypothesis import settings
except ImportError:  # a machine that is only there for its GPU
    settings = None

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():  # read when triton is first imported, which no conftest does
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)

# The same examples on every run; a deadline would only measure how busy the machine is.
if settings is not None:
    settings.register_profile("deterministic", derandomize=True, deadline=None, max_examples=40)
    settings.load_profile("deterministic")


def pytest_collection_finish():
    # Every training collects garbage once. Nothing of what is loaded by now is any, and to look
    # through it takes twice as long as a micro run.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def quick_compile(monkeypatch):
    """torch.compile traces and guards as ever, but skips the code generation, which takes a minute.

    Returns a function: how many graphs have been compiled since the test began.
    """
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch.compiler.reset()
