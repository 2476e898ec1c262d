"""`ddl bench op`: the bytes it counts, the check before every figure, and the rows it leaves."""

import csv
from dataclasses import replace
from functools import partial

import pytest
import torch
from fused_cases import DEVICE, can_run

import deep_delta_cli
from deep_delta.bench import cases as cases_module
from deep_delta.bench import op as bench
from deep_delta.bench.cases import OPS, SEQUENCE, Case, cases, make_inputs, minimum_bytes
from deep_delta.bench.check import operation_difference

CPU = torch.device("cpu")
OTHERS = [name for name in OPS if name != "reads"]


def case(op="read", value_channels=4, kernel_size=0, dtype=torch.bfloat16, width=16):
    return Case(op, width, value_channels, kernel_size, SEQUENCE, dtype)


@pytest.mark.parametrize(
    ("op", "value_channels", "dtype", "forward", "backward"),
    # Bytes a token and feature, by hand: bf16 has 2, fp32 has 4, and X has d_v = 4 channels.
    [
        ("rewrite", 4, torch.bfloat16, 8 + 2 + 8, 8 + 2 + 8 + 8 + 2),
        ("read", 4, torch.bfloat16, 8 + 2 + 8 + 2, 8 + 2 + 8 + 2 + 8 + 2),
        ("read", 4, torch.float32, 16 + 4 + 16 + 4, 16 + 4 + 16 + 4 + 16 + 4),
        # The state in between is not written, and read once, with both writes, by the second read.
        ("reads", 4, torch.bfloat16, (8 + 2 + 2) + (8 + 2 + 2 + 8 + 2), (30 + 2) + 30),
        ("additive", 1, torch.bfloat16, 2 + 2 + 2 + 2, 2 + 2 + 2 + 2),
        ("reduce", 4, torch.bfloat16, 8 + 2 + 4, 8 + 2 + 4 + 8 + 2),
        ("expand", 4, torch.bfloat16, 4 + 8, 4 + 8 + 4),
    ],
)
def test_minimum_bytes(op, value_channels, dtype, forward, backward):
    features = SEQUENCE * 16
    expected = (features * forward, features * backward)
    assert minimum_bytes(case(op, value_channels, dtype=dtype)) == expected
    # What a convolution has to move is what a single token has to.
    assert minimum_bytes(case(op, value_channels, 4, dtype)) == expected


def test_cases_that_make_no_sense_are_left_out():
    found = cases(list(OPS), [16], [1, 4], [1, 4], SEQUENCE, torch.float32)
    assert [(c.op, c.value_channels, c.kernel_size) for c in found] == [
        ("read", 1, 0), ("read", 4, 1), ("read", 4, 4),
        ("reads", 1, 0), ("reads", 4, 1), ("reads", 4, 4),
        ("reduce", 1, 0), ("reduce", 4, 1), ("reduce", 4, 4),
        ("rewrite", 1, 0), ("rewrite", 4, 0),
        ("expand", 1, 4), ("expand", 4, 4),
        ("additive", 1, 0),
    ]  # fmt: skip


def test_inputs_lie_in_memory_as_in_a_model_and_none_is_zero():
    made = make_inputs(case(kernel_size=4), CPU, torch.Generator().manual_seed(0))
    assert made["state"].shape == (1, SEQUENCE, 16, 4)
    assert made["state"].mT.is_contiguous()
    assert all(x.requires_grad and x.count_nonzero() > 0.9 * x.numel() for x in made.values())


def difference(spoil, dtype, op="rewrite"):
    """What the check says of the reference with its outputs by name changed by `spoil`."""
    generator = torch.Generator().manual_seed(0)
    one = case(op, 4, 4 if op.startswith("read") else 0, dtype)
    inputs = make_inputs(one, CPU, generator)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return operation_difference(
            one, lambda x: spoil(OPS[op](x, backend="reference"), x), inputs, generator
        )


class OnlyInReverse(torch.autograd.Function):
    """The identity whose gradient is one per cent too large."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 1.01


SPOILS = {
    "output": lambda out, x: {**out, "state": out["state"] * 1.01},
    "not a number": lambda out, x: {**out, "state": out["state"] + float("nan")},
    "gradient": lambda out, x: {**out, "state": OnlyInReverse.apply(out["state"])},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("spoil", SPOILS)
def test_an_operation_that_is_off_by_a_hundredth_is_found(spoil, dtype):
    line = difference(SPOILS[spoil], dtype)
    assert line.startswith("gradient of " if spoil == "gradient" else "state, ")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("op", ["read", "reads"])
def test_the_reference_is_no_different_from_itself(op, dtype):
    assert difference(lambda out, x: out, dtype, op) is None


@can_run
@pytest.mark.parametrize(
    "op", ["reads", *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS)]
)
def test_the_fused_operation_passes_its_check(op, monkeypatch):
    monkeypatch.setattr(cases_module, "SEQUENCE", 4)
    # In fp32, because the interpreter cuts bf16 off instead of rounding it.
    one = Case(op, 16, 1 if op == "additive" else 2, 4 if op == "expand" else 0, 8, torch.float32)
    if op in ("read", "reads", "reduce"):
        one = replace(one, kernel_size=2)
    generator = torch.Generator(DEVICE).manual_seed(0)
    inputs = make_inputs(one, torch.device(DEVICE), generator)
    operation = partial(OPS[op], backend="triton")
    assert operation_difference(one, operation, inputs, generator) is None


@pytest.fixture
def wrong_compile(monkeypatch):
    """The provider "compile" with outputs one per cent too large, for "rewrite" only."""

    def provide(call):
        right = partial(call, backend="reference")
        if call is not OPS["rewrite"]:
            return right
        return lambda x: {name: 1.01 * out for name, out in right(x).items()}

    monkeypatch.setitem(bench.PROVIDERS, "compile", provide)


def test_what_differs_gets_no_figures_and_the_rest_does(wrong_compile, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    words = "bench op --ops rewrite,additive --width 16 --value-channels 4 --tokens 1024"
    words += f" --providers compile,reference --repeats 2 --csv {path}"
    assert deep_delta_cli.main(words.split()) == 1
    printed = capsys.readouterr()
    assert printed.err == "ddl: some rows have no figures: the table says why\n"
    assert "differs from the reference: state, " in printed.out
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["provider"], row["pass"]) for row in rows] == [
        (name, provider, way)
        for name in ("rewrite", "additive")
        for provider in ("compile", "reference")
        for way in ("forward", "backward")
    ]
    for row in rows:
        refused = (row["name"], row["provider"]) == ("rewrite", "compile")
        assert (row["status"] == "ok") is not refused
        assert bool(row["ms"] and row["share_of_copy"] and row["tokens_per_s"]) is not refused


def test_a_provider_that_breaks_is_a_row_and_not_the_end(monkeypatch, capsys):
    def broken(call):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(bench.PROVIDERS, "compile", broken)
    words = "bench op --ops rewrite --width 16 --value-channels 1 --repeats 1"
    assert deep_delta_cli.main([*words.split(), "--providers", "compile,reference"]) == 1
    printed = capsys.readouterr()
    assert "compile   | forward  | failed: RuntimeError" in printed.out
    assert "| reference | forward  |" in printed.out
    assert "no such kernel" in printed.err, "the trace is on stderr"


def test_every_operation_runs_on_a_cpu(capsys):
    words = "bench op --width 16 --tokens 1024 --providers reference --repeats 1"
    assert deep_delta_cli.main(words.split()) == 0
    assert capsys.readouterr().out.count(" backward |") == 14
