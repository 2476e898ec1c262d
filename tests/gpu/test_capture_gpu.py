"""What is replayed as a CUDA graph is what the host launches."""

import pytest
import torch
from torch import nn

import deep_delta.bench.op
import deep_delta_cli
from deep_delta import DeepDeltaConfig, DeepDeltaForCausalLM
from deep_delta.model.capture import captured
from deep_delta.model.compile import compile_layers

pytest.importorskip("triton", reason="the fused kernels need triton")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

STEPS, VOCABULARY = 6, 61


def losses(variant: str, graph: bool, options: dict) -> list[float]:
    """The loss of each step of a compiled model, on another batch at every step."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "state_dtype": "bfloat16", "backend": "triton"}
    config = DeepDeltaConfig.from_preset(variant, "tiny", **sizes, **options)
    model = compile_layers(DeepDeltaForCausalLM(config).train().cuda())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    batches = torch.randint(VOCABULARY, (STEPS, 4, 64), device="cuda")

    def forward_backward(ids):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(ids, labels=ids, skip_logits=True, use_cache=False).loss
        loss.backward()
        return loss.detach()

    forward_backward(batches[0])
    model.zero_grad(set_to_none=True)
    step = captured(forward_backward, batches[0]) if graph else forward_backward
    curve = []
    for ids in batches:
        curve.append(step(ids).clone())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if not graph:
            model.zero_grad(set_to_none=True)
    return torch.stack(curve).tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "options"),
    [("additive", {}), ("ddl-cc", {"rebuild": 1}), ("ddl-tc", {})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_losses_are_the_same(variant, options):
    # The attention's backward pass adds in any order; a step too few or an old batch is 100 × that.
    launched, replayed = (losses(variant, graph, options) for graph in (False, True))
    assert replayed == pytest.approx(launched, abs=2e-3)
    assert len({round(loss, 2) for loss in launched}) > 3


def test_benchmark_replays_what_it_checked(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    words = "bench model --size tiny --batch 2 --seq-len 32 --steps 2 --warmup 1 --cuda-graphs"
    status = deep_delta_cli.main([*words.split(), "--variants", "ddl-cc", "--csv", str(path)])
    assert status == 0, capsys.readouterr().out
    assert path.read_text().count(" cuda-graphs rebuild=speed,bfloat16") == 8


@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_benchmark_replays_operations_that_it_checked(factor, tmp_path, capsys, monkeypatch):
    replayed = deep_delta.bench.op.replayed

    def spoiled(works, count):
        work, result = replayed(works, count)
        return lambda: lambda: (work()(), [x.detach().mul_(factor) for x in result]), result

    monkeypatch.setattr(deep_delta.bench.op, "replayed", spoiled)
    path = tmp_path / "rows.csv"
    words = "bench op --ops read --width 64 --value-channels 4 --kernel-sizes 1 --repeats 2"
    status = deep_delta_cli.main([*words.split(), "--csv", str(path)])
    rows = path.read_text()
    assert status == (factor != 1), capsys.readouterr().out
    assert rows.count(",ok\n") == (6 if factor == 1 else 0)
    assert rows.count(",differs as a CUDA graph\n") == (0 if factor == 1 else 6)
