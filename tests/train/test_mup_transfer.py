"""scripts/mup_transfer.py: what it trains, keeps, draws and prints."""

import csv
import importlib.util
import math
import sys

import pytest
from helpers import REPO


@pytest.fixture
def script(monkeypatch, micro_data):
    """The script on the micro data, with two learning rates and short sequences."""
    path = REPO / "scripts" / "mup_transfer.py"
    spec = importlib.util.spec_from_file_location("mup_transfer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    small = {"RATES": (1e-3, 1e-2), "BATCH": 2, "LENGTH": 16, "EVALUATED": 4, "HEAD_DIM": 16}
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "prepare_bundled", lambda out: micro_data)
    return module


def run(script, monkeypatch, out, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["mup_transfer", "--out", str(out), *words])
    script.main()


SMALL = ("--widths", "16", "32", "--steps", "2")


def test_sweep_is_kept_drawn_and_not_repeated(script, monkeypatch, tmp_path, capsys):
    trained, train = [], script.train
    monkeypatch.setattr(
        script, "train", lambda cell, *data: trained.append(cell) or train(cell, *data)
    )
    run(script, monkeypatch, tmp_path, *SMALL)
    # Both parametrisations are one model at the base width, which is trained once.
    assert [(c.parametrisation, c.width) for c in trained] == [
        *[("standard", 16)] * 2, *[("standard", 32)] * 2, *[("µP", 32)] * 2,
    ]  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open(encoding="utf-8")))
    assert len(rows) == 8
    assert all(0 < float(row["val_loss"]) < 20 for row in rows)
    wide = {(r["parametrisation"], r["lr"]): r["val_loss"] for r in rows if r["width"] == "32"}
    assert len(set(wide.values())) == 4
    assert (tmp_path / "ddl-cc-2-steps.png").stat().st_size > 5000
    table = capsys.readouterr().out.splitlines()[-7:]
    assert [line.split()[:3] for line in table[1:5]] == [
        ["ddl-cc", name, width] for name in ("standard", "µP") for width in ("16", "32")
    ]
    trained.clear()
    run(script, monkeypatch, tmp_path, *SMALL)
    assert trained == []
    assert capsys.readouterr().out.splitlines()[-7:] == table


def test_diverged_runs_are_gaps(script):
    curve = {1e-3: 5.0, 1e-2: 4.0, 1e-1: math.nan}
    assert script.best(curve) == 1e-2
    script.draw({"standard": {16: [curve]}, "µP": {16: [{**curve, 1e-2: math.nan}]}}, "ddl-cc")


def test_optimum_lies_between_the_rates(script):
    parabola = {2.0**x: 3 + 0.1 * (x + 5.3) ** 2 for x in range(-8, -2)}
    assert script.best(parabola) == 2.0**-5
    assert script.optimum(parabola) == pytest.approx(-5.3)
    assert script.optimum({0.5: 2.0, 0.25: 2.0, 0.125: 2.0}) in (-math.inf, math.inf)
    assert script.optimum({0.5: math.nan, 0.25: 2.0, 0.125: 3.0}) == math.inf
    assert script.optimum({0.5: 4.0, 0.25: 3.0, 0.125: 2.0}) == -math.inf


def test_table_is_of_the_mean_over_seeds(script):
    """The first width's best rate, 2^-3, loses 0.5 at the second, whose best one is 2^-4."""
    first = [{0.25: 3.0, 0.125: 2.0, 0.0625: 3.0}]
    wide = [{0.25: 3.0, 0.125: 2.0, 0.0625: 1.0, 0.03125: 2.0},
            {0.25: 3.0, 0.125: 1.0, 0.0625: 1.0, 0.03125: 2.0}]  # fmt: skip
    lines = script.table({"standard": {16: first, 32: wide}}, "ddl-cc")
    assert lines[0].split() == [
        "ddl-cc", "standard", "16", "-3", "-3.00", "[-3.00,", "-3.00]", "2.0000", "+0.0000",
    ]  # fmt: skip
    assert lines[1].split()[3:] == ["-4", "-3.75", "[-4.00,", "-3.50]", "1.0000", "+0.5000"]


def test_schedule_warms_up_and_falls_to_a_tenth(script):
    shares = [script.share_of_peak(step, 100) for step in range(100)]
    assert shares[:11] == pytest.approx([*[n / 10 for n in range(1, 11)], 1.0])
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert 0.1 < shares[-1] < 0.11


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--widths", "24"], "width 24 is not a multiple of 16"),
        (["--variants", "ddl-ccc"], "did you mean 'ddl-cc'"),
    ],
)
def test_wrong_choice_is_one_line(script, monkeypatch, tmp_path, words, said):
    with pytest.raises(SystemExit, match=said):
        run(script, monkeypatch, tmp_path, *words, "--steps", "1")


def test_foreign_csv_is_one_line(script, monkeypatch, tmp_path):
    (tmp_path / "sweep.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="not a sweep"):
        run(script, monkeypatch, tmp_path, *SMALL)
