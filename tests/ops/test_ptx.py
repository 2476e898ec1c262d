"""The kernels compile for the GPUs they are meant for, without one of them being here."""

import json
import os
import subprocess
import sys

import pytest
from helpers import REPO

pytest.importorskip("triton", reason="the fused kernels need triton")

KERNELS = (
    "forward", "norm_backward", "backward", "wide_backward", "weights_backward", "expand_forward",
    "expand_backward",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kernels_compile_for_every_gpu_and_keep_their_numbers_in_registers(tmp_path):
    """Ampere, Hopper and Blackwell; d = 768, and d_v = 4 wherever there are channels.

    More than 128 bytes a thread in local memory would cost bandwidth, which is all they need.
    """
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(REPO)}
    environment.pop("TRITON_INTERPRET", None)
    script = REPO / "tests" / "ops" / "compile_kernels.py"
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    spills = json.loads(run.stdout)
    for kernel in KERNELS:
        assert any(name.split()[1:] == [kernel, "sm_90"] for name in spills), kernel
    assert {name.split()[2] for name in spills} == {"sm_80", "sm_90", "sm_100"}
    assert {name: spilled for name, spilled in spills.items() if spilled > 128} == {}
