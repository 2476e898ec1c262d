"""`ddl bench model`: models are checked before they are timed, and every row says how it came."""

import csv

import pytest
import torch

import deep_delta_cli
from deep_delta.bench import model as bench
from deep_delta.bench import subject
from deep_delta.bench.check import Outcome, distance, model_difference

TINY = "bench model --size tiny --batch 2 --seq-len 32 --steps 1 --warmup 1"


@pytest.fixture
def rows(tmp_path):
    """Run `ddl bench model` at the size "tiny": (exit status, rows of its CSV)."""

    def run(*words):
        path = tmp_path / "rows.csv"
        status = deep_delta_cli.main([*TINY.split(), *words, "--csv", str(path)])
        with path.open() as file:
            return status, list(csv.DictReader(file))

    return run


@pytest.mark.slow
def test_additive_comes_first_and_all_are_timed_in_turns(rows, capsys):
    status, found = rows("--variants", "ddl-cc,additive")
    assert status == 0
    assert [(row["name"], row["pass"], row["timing"]) for row in found] == [
        (name, mode, timing)
        for timing in ("alone", "in turns")
        for name in ("additive", "ddl-cc")
        for mode in ("train", "prefill")
    ]
    for row in found:
        assert row["status"] == "ok"
        assert float(row["tokens_per_s"]) == pytest.approx(64 / float(row["ms"]) * 1e3, rel=0.01)
        assert float(row["ratio"]) > 0
        assert bool(row["first_step_s"] and row["peak_gib"]) is (row["pass"] == "train")
    for row in found[:2] + found[4:6]:
        assert float(row["ratio"]) == 1
    printed = capsys.readouterr().out
    assert "| additive (reference) |" in printed
    assert "ratios: tokens/s and peak memory over those of additive (reference)" in printed
    assert "additive (reference), prefill, at the end against the start: " in printed


def longer_norm(model):
    model.model.norm.weight.data.mul_(1.1)


def wrong_gradient(model):
    model.model.layers[1].mlp.up_proj.weight.register_hook(lambda gradient: 1.5 * gradient)


def wrong_only_in_prefill(model):
    norm = model.model.norm
    norm.register_forward_hook(lambda module, _, out: out if module.training else 1.1 * out)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (longer_norm, "loss "),
        (wrong_gradient, "gradient of model.layers.*.mlp.up_proj.weight, error "),
        (wrong_only_in_prefill, "logits, error "),
    ],
)
def test_a_model_that_differs_gets_no_figures(rows, monkeypatch, capsys, spoil, expected):
    monkeypatch.setattr(subject, "compile_layers", spoil)  # what sets "compile" apart
    status, found = rows("--variants", "additive", "--providers", "reference,compile")
    assert status == 1
    right, wrong = (
        [row for row in found if row["provider"] == name] for name in ("reference", "compile")
    )
    assert all(row["status"] == "ok" and row["ms"] for row in right)
    assert len(wrong) == 1
    assert wrong[0]["status"].startswith(f"differs from the reference: {expected}")
    assert not any(wrong[0][name] for name in ("ms", "tokens_per_s", "ratio", "peak_gib"))
    assert capsys.readouterr().err == "ddl: some rows have no figures: the table says why\n"


def test_what_cannot_be_had_or_breaks_is_a_row(rows, monkeypatch, capsys):
    begin, config = subject.Subject.begin, subject.Subject.config

    def unavailable(self):
        if self.variant == "ddl-cc":
            raise ValueError("no\nsuch thing")
        return config(self)

    def broken(self):
        if self.variant == "ddl-tc":
            raise KeyError("a bug")
        begin(self)

    monkeypatch.setattr(subject.Subject, "config", unavailable)
    monkeypatch.setattr(subject.Subject, "begin", broken)
    status, found = rows("--variants", "ddl-cc,ddl-tc", "--modes", "prefill")
    assert status == 1
    assert [row["status"] for row in found] == [
        "ok", "not available: no such thing", "failed: KeyError"
    ]  # fmt: skip
    assert "a bug" in capsys.readouterr().err


def test_models_that_do_not_fit_together_are_let_go(monkeypatch):
    setup = subject.Setup(
        torch.device("cuda"), "tiny", 2, 32, "bfloat16", False, False, "torch", ()
    )
    for name in ("empty_cache", "memory_allocated", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: type("Gpu", (), {"total_memory": 100}))
    held = iter([30, 60, 60])
    monkeypatch.setattr(bench, "_allocated", lambda: next(held))
    record = bench.Record("ddl")
    running = bench.Benchmark(setup, 1, 1, record)
    subjects = [subject.Subject("additive", "triton", 0, setup) for _ in range(3)]
    for each in subjects:
        each.model = "held"
        running.peak[each] = 40
        running._make_room(each, bench.OK)
    assert [each.model for each in subjects] == ["held", None, None]
    assert running.kept == subjects[:1]
    assert not running.interleave


def test_peak_memory_is_without_other_models_but_with_the_models_own(monkeypatch):
    class Measured(bench.PeakMemory):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.bytes = 7  # beyond what was there when it began

    setup = subject.Setup(
        torch.device("cpu"), "tiny", 2, 32, "bfloat16", False, False, "torch", ("train",)
    )
    running = bench.Benchmark(setup, 1, 1, bench.Record("ddl"))
    one = subject.Subject("additive", "reference", 0, setup)
    held = iter([30, 100])  # before and after the model is built
    monkeypatch.setattr(bench, "_allocated", lambda: next(held))
    monkeypatch.setattr(bench, "PeakMemory", Measured)
    monkeypatch.setattr(bench, "host_time", lambda _: None)
    monkeypatch.setattr(subject.Subject, "begin", lambda _: None)
    monkeypatch.setattr(subject.Subject, "capture", lambda *_: None)
    monkeypatch.setattr(running, "_alone", lambda *_: 1.0)
    assert running._attempt(one) == bench.OK
    assert running.peak == {one: 70 + 7}


def test_the_rule_for_models():
    def outcome(loss, *gradient):
        return Outcome(loss, {"w": [torch.tensor(gradient)]})

    exact = outcome(2.0, 3.0, 4.0)
    rounded = outcome(2.01, 3.0, 4.1)  # off by 0.01, and by 0.1/5 of the norm
    assert model_difference(outcome(2.0209, 3.0, 4.1), rounded, exact) is None
    assert model_difference(outcome(2.0211, 3.0, 4.1), rounded, exact).startswith("loss 2.02110")
    assert model_difference(outcome(2.0, 3.0, 4.44), rounded, exact) is None
    assert model_difference(outcome(2.0, 3.0, 4.46), rounded, exact).startswith("gradient of w")
    assert model_difference(outcome(float("nan"), 3.0, 4.0), rounded, exact).startswith("loss nan")
    other = Outcome(2.0, {"v": [torch.zeros(2)]})
    assert model_difference(other, rounded, exact) == "gradients of v, w"
    nothing = [torch.zeros(2)]
    assert distance(nothing, nothing) == 0
    assert distance([torch.ones(2)], nothing) == float("inf")


def test_cuda_graphs_need_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert deep_delta_cli.main([*TINY.split(), "--cuda-graphs"]) == 1
    assert capsys.readouterr().err == "ddl: --cuda-graphs needs a GPU\n"


@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_what_a_graph_gives_is_what_its_capture_gave(monkeypatch, factor):
    """With something that stands for a graph: it overwrites gradients, as one does."""

    def captured(call, example, pool):
        assert pool == "pool"

        def replay(ids):
            if call.__name__ == "_forward_backward":
                running.model.zero_grad()
            return call(ids) * factor

        return replay

    monkeypatch.setattr(subject, "captured", captured)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    where = torch.device("cpu")
    setup = subject.Setup(
        where, "tiny", 2, 32, "bfloat16", False, True, "torch", ("train", "prefill")
    )
    running = subject.Subject("ddl-cc", "reference", "speed", setup)
    running.begin()
    for mode, what in (("train", "loss "), ("prefill", "logits, error ")):
        if factor == 1:
            running.capture(mode)
            running.work(mode)()
        else:
            with pytest.raises(subject.Wrong, match=f"differs as a CUDA graph: {what}"):
                running.capture(mode)
    assert running.model.lm_head.weight.grad is not None
