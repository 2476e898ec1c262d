"""Peak memory on a GPU: what a run takes, whatever lies there already."""

import pytest
import torch

from deep_delta.accounting import PeakMemory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MIB = 2**20


def block(mebibytes: int) -> torch.Tensor:
    return torch.ones(mebibytes * MIB // 4, device="cuda")


def test_memory_of_a_run_is_without_what_earlier_ones_left():
    left, passing = block(256), block(512)
    del passing  # the peak so far
    with PeakMemory() as memory:
        own = block(64)
        del own
    assert memory.bytes == 64 * MIB
    assert left.numel() == 64 * MIB
