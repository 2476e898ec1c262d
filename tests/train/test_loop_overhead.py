"""scripts/loop_overhead.py: both numbers, of two sides that train the same, or none."""

import argparse
import dataclasses
import importlib.util
import json
import sys

import pytest
import torch
from helpers import REPO

SMALL = ["--size", "tiny", "--batch", "2", "--seq-len", "16", "--steps", "2", "--rounds", "2"]


@pytest.fixture
def script():
    path = REPO / "scripts" / "loop_overhead.py"
    spec = importlib.util.spec_from_file_location("loop_overhead", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script, monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["loop_overhead", *SMALL, *words])
    script.main()


@pytest.mark.slow
def test_table_has_both_sides_and_the_file_every_round(script, monkeypatch, tmp_path, capsys):
    file = tmp_path / "figures.json"
    run(script, monkeypatch, "--json", str(file))
    head, _, *rows, footer = capsys.readouterr().out.splitlines()[-5:]
    names = [name.strip() for name in head.split("|")[1:-1]]
    assert [row.split()[1] for row in rows] == ["additive", "ddl-cc"]
    figures = json.loads(file.read_text())["seconds a step"]
    for line, (variant, found) in zip(rows, figures.items(), strict=True):
        cells = dict(zip(names, (cell.strip() for cell in line.split("|")[1:-1]), strict=True))
        assert cells["variant"] == variant
        loop, bare = (sum(found["rounds"][side]) / 2 for side in ("loop", "bare"))
        assert float(cells["loop ms"]) == pytest.approx(1e3 * loop, abs=0.01)
        assert float(cells["bare ms"]) == pytest.approx(1e3 * bare, abs=0.01)
        assert float(cells["loop/bare"]) == pytest.approx(loop / bare, abs=1e-4)
        speed = float(cells["loop tokens/s"].replace(",", ""))
        assert speed == pytest.approx(2 * 16 / loop, abs=1)
        assert found["loss_difference"] < 1e-6  # on a CPU nothing rounds differently
        assert cells["loop host ms"] == "–" or torch.cuda.is_available()
    assert "2 rounds of 2 steps, in turns; size=tiny batch=2 seq_len=16 state=float32" in footer


def with_other(change=lambda batches: batches, **fields):
    """A start of the bare loop with other batches, or by a recipe with other values."""

    def planted(init):
        return lambda self, recipe, batches: init(
            self, dataclasses.replace(recipe, **fields), change(batches)
        )

    return planted


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        (with_other(seed=1), "start from other weights"),
        (with_other(lambda batches: [ids.roll(1, 0) for ids in batches]), "saw other batches"),
        (with_other(lr=1.1e-3), "losses part at step 2"),
        (with_other(warmup_steps=6), "losses part at step 2"),
        (with_other(clip=1e9), "losses part at step"),
        (with_other(weight_decay=0.0), "losses part at step"),
    ],
)
def test_sides_that_train_otherwise_get_no_figures(script, monkeypatch, capsys, planted, said):
    monkeypatch.setattr(script.BareLoop, "__init__", planted(script.BareLoop.__init__))
    with pytest.raises(SystemExit, match=said):
        run(script, monkeypatch, "--variants", "additive")
    assert "bare" not in capsys.readouterr().out


@pytest.mark.slow
def test_bare_loop_runs_the_compiled_graphs_of_the_run(
    script, monkeypatch, tmp_path, quick_compile
):
    """Other graphs could be slower or faster ones, and would be compiled in the GPU's time."""
    options = argparse.Namespace(
        size="tiny", batch=2, seq_len=16, steps=1, rounds=1, state_dtype="float32"
    )
    recipe = dataclasses.replace(script.recipe_of("ddl-cc", options, tmp_path), compile=True)
    step, new = script.BareLoop.step, []

    def counted(self):
        before = quick_compile()
        step(self)
        new.append(quick_compile() - before)

    monkeypatch.setattr(script.BareLoop, "step", counted)
    script.measure(recipe, options.rounds)
    assert quick_compile() == 6
    assert new == [0] * (script.CHECKED + 1 + script.HOST_STEPS)
