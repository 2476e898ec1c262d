"""The training loop on a GPU: its CUDA graphs, and the memory that a run is said to take."""

import json

import pytest
import torch
from train.micro import make_data, rows_of

from deep_delta.train import Recipe, train

pytest.importorskip("triton", reason="the fused kernels need triton")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def run(data, out, **fields):
    recipe = Recipe(
        data=str(data), out=str(out), steps=8, batch_size=8, seq_len=64, warmup_steps=2,
        log_every=1, eval_every=8, eval_sequences=4, trackers="none", precision="fp32", **fields,
    )  # fmt: skip
    result = train(recipe)
    return [row["loss"] for row in rows_of(recipe.run_folder, "loss")], result


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["additive", "ddl-cc", "ddl-tc"])
@pytest.mark.parametrize("fields", [{}, {"micro_batch_size": 4}, {"mask_documents": True}], ids=str)
def test_graphs_train_what_launches_do(data, tmp_path, variant, fields):
    """Gradients of passes that are replayed add up, and labels and positions are the step's own."""
    launched, _ = run(data, tmp_path / "launched", variant=variant, **fields)
    replayed, _ = run(data, tmp_path / "replayed", variant=variant, cuda_graphs=True, **fields)
    # In fp32 a step whose batch, gradients or update were another's is 100 times as far off.
    assert replayed == pytest.approx(launched, abs=2e-4)
    assert len({round(loss, 2) for loss in launched}) > 3


def test_memory_is_the_runs_own(data, tmp_path):
    """Also where something else lies on the GPU, or an earlier run took more."""
    _, alone = run(data, tmp_path / "alone", variant="ddl-cc")
    run(data, tmp_path / "larger", variant="ddl-cc", model={"num_hidden_layers": 8})
    kept = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    _, again = run(data, tmp_path / "again", variant="ddl-cc")
    del kept
    assert again.peak_memory_bytes == pytest.approx(alone.peak_memory_bytes, rel=0.05)
    rows = [json.loads(line) for line in (tmp_path / "again/ddl-cc/seed-0/metrics.jsonl").open()]
    logged = [row["memory_bytes"] for row in rows if "loss" in row]
    assert max(logged) <= again.peak_memory_bytes
    assert max(logged) > 0.5 * again.peak_memory_bytes
