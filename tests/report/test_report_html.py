import html
import math
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report.comparison_helpers import with_budgets, with_search, with_speed

from deep_delta.errors import UserError
from deep_delta.report import write_report
from deep_delta.report.sentences import judged_by, judged_text

Make = Callable[..., Any]

VOID = {"meta", "br", "link", "img", "hr"}
LOSSES = {
    "additive": {1: 3.30, 2: 3.31, 3: 3.29},
    "ddl-cc": {1: 3.28, 2: 3.29, 3: 3.268},
    "<b>x": {1: 3.31, 2: 3.30, 3: math.nan},
}


class Page(HTMLParser):
    """Collects what the tests ask about, and fails on a tag that closes out of turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.svgs: list[dict[str, str | None]] = []
        self.inside_svgs: list[str] = []
        self.loads: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def _note(self, tag: str, attributes: dict[str, str | None]) -> None:
        assert tag not in {"script", "link", "img", "iframe", "b"}
        if attributes.get("id"):
            self.ids.append(str(attributes["id"]))
        if tag == "svg":
            self.svgs.append(attributes)
        if self.open and self.open[-1] == "svg" and tag in ("title", "desc"):
            self.inside_svgs.append(tag)
        self.loads += [str(attributes[key]) for key in ("href", "src") if key in attributes]


def test_page_is_whole_self_contained_and_accessible(
    tmp_path: Path, summary_of: Make, curves_of: Make
) -> None:
    path = write_report(summary_of(LOSSES), curves_of(LOSSES), tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"https?://", text)
    assert "@import" not in text
    assert all(load.startswith("#") and load[1:] in page.ids for load in page.loads)
    assert all(name in page.ids for name in re.findall(r"url\(#([^)]+)\)", text))
    assert len(page.svgs) == 4
    for svg in page.svgs:
        assert svg["role"] == "img"
        assert svg["aria-label"]
        assert svg["aria-describedby"] in page.ids
    assert page.inside_svgs == ["title", "desc"] * 4
    assert "currentColor" in text
    assert "prefers-color-scheme" in text
    words = "".join(page.words)
    assert "<b>x" in words
    assert "diverged" in words
    assert "not in a git repository" in words


def test_conclusions_are_marked_by_their_verdicts(
    tmp_path: Path, summary_of: Make, curves_of: Make
) -> None:
    far = {seed: loss + 1.0 for seed, loss in LOSSES["additive"].items()}
    losses = {**LOSSES, "ddl-tc": far, "ddl-ec": LOSSES["additive"]}
    summary = summary_of(losses)
    text = write_report(summary, curves_of(losses), tmp_path).read_text(encoding="utf-8")
    header = text[: text.index("</header>")]
    marks = re.findall(r"<li(?: class=\"(\w+)\")?>([^:]+): ", header)
    assert marks == [("lower", "ddl-cc"), ("", "&lt;b&gt;x"), ("higher", "ddl-tc"), ("", "ddl-ec")]
    assert html.escape(judged_by(summary)) in text


def test_charts_are_written(tmp_path: Path, summary_of: Make, curves_of: Make) -> None:
    summary = with_budgets(with_search(summary_of(LOSSES)))
    write_report(summary, curves_of(LOSSES), tmp_path)
    charts = {path.stem: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert charts.keys() == {
        "loss-vs-tokens", "loss-vs-flops", "loss-vs-time", "differences", "rates", "curve",
    }  # fmt: skip
    for data in charts.values():
        assert data.startswith(b"\x89PNG")
        assert len(data) > 8000


def test_same_input_gives_the_same_bytes(tmp_path: Path, summary_of: Make, curves_of: Make) -> None:
    for folder in ("one", "two"):
        write_report(summary_of(LOSSES), curves_of(LOSSES), tmp_path / folder)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    drawn = ("differences", "loss-vs-flops", "loss-vs-time", "loss-vs-tokens")
    charts = [f"{name}.{kind}" for name in drawn for kind in ("png", "svg")]
    assert names == [*charts, "report.html"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_without_a_baseline_there_is_no_chart_of_differences(
    tmp_path: Path, summary_of: Make, curves_of: Make
) -> None:
    losses = {"ddl-cc": {1: 3.3}}
    text = write_report(summary_of(losses, baseline=None), curves_of(losses), tmp_path).read_text(
        encoding="utf-8"
    )
    assert len(Page(text).svgs) == 3
    assert "nothing was run to compare it with" in text
    assert not (tmp_path / "differences.png").exists()


def test_page_of_everything_with_dangerous_names(
    tmp_path: Path, summary_of: Make, curves_of: Make
) -> None:
    dangerous, long = '<b>&"', "sixty characters in words " * 2 + "x" * 8
    losses = {**LOSSES, dangerous: LOSSES["ddl-cc"], long: LOSSES["additive"]}
    summary = with_speed(with_budgets(with_search(summary_of(losses, tested=True))))
    summary["arms"][3]["fields"] = {"variant": "ddl-cc", "model.gate": "</td><b>"}
    page = Page(write_report(summary, curves_of(losses), tmp_path).read_text(encoding="utf-8"))
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert len(page.svgs) == 6
    words = "".join(page.words)
    assert dangerous in words
    assert long in words
    assert "ddl-cc, model.gate = </td><b>" in words
    for said in (
        judged_text(summary),
        f"{dangerous}: ",
        "more trainings",
        "2e-3 (6 tries), highest tried",
        "Arms had different numbers of tries",
        "1.10 means that the arm costs 10 % more than the baseline does",
        "lowest to highest round",
    ):
        assert said in words


def test_a_forest_of_any_pairs_names_both_arms(
    tmp_path: Path, summary_of: Make, curves_of: Make
) -> None:
    losses = dict.fromkeys(("additive", "a", "b"), LOSSES["ddl-cc"])
    summary = summary_of(losses, pairs=[("a", "additive"), ("b", "a")])
    write_report(summary, curves_of(losses), tmp_path)
    drawn = (tmp_path / "differences.svg").read_text(encoding="utf-8")
    assert "b \u2212 a" in drawn
    assert "difference in val loss (nats/token)" in drawn
    write_report(summary_of(losses), curves_of(losses), tmp_path)
    drawn = (tmp_path / "differences.svg").read_text(encoding="utf-8")
    assert "\u2212 a" not in drawn
    assert "difference in val loss to additive (nats/token)" in drawn


def test_rates_that_diverged_are_crosses(summary_of: Make) -> None:
    from deep_delta.report.search_plots import rate_curves
    from deep_delta.report.style import arm_styles

    rates = with_search(summary_of(LOSSES))["rates"]
    key = {name: name for name in LOSSES}
    (axes,) = rate_curves(rates, key, arm_styles(LOSSES)).axes
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in crosses] == [
        (4e-3, 1.0), (4e-3, 0.95),
    ]  # fmt: skip
    rings = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in rings] == [
        (1e-3, 3.4), (1e-3, 3.4), (2e-3, 3.4),
    ]  # fmt: skip
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "5e-4",
        "1e-3",
        "2e-3",
        "4e-3",
    ]


def test_everything_diverged(tmp_path: Path, summary_of: Make, curves_of: Make) -> None:
    losses = {"additive": {1: math.nan}, "ddl-cc": {1: math.inf}}
    text = write_report(summary_of(losses), curves_of(losses), tmp_path).read_text(encoding="utf-8")
    assert "no evaluation with a finite loss" in text


def test_dollar_signs_and_user_settings_are_left_alone(
    tmp_path: Path, summary_of: Make, curves_of: Make
) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    losses = {"additive": {1: 3.0}, "$x^$": {1: 3.0}}
    text = write_report(summary_of(losses), curves_of(losses), tmp_path).read_text(encoding="utf-8")
    assert text.count("$x^$") > 4
    assert dict(matplotlib.rcParams) == before


def test_missing_matplotlib_is_the_users_to_put_right(
    tmp_path: Path, summary_of: Make, curves_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'deep-delta-learning\[report\]'"):
        write_report(summary_of(LOSSES), curves_of(LOSSES), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_importing_the_package_imports_no_matplotlib() -> None:
    # What the rest of deep_delta imports is not this package's doing: look at what is added.
    code = (
        "import sys, deep_delta; before = set(sys.modules); "
        "import deep_delta.report as r, deep_delta.report.html; r.write_report; "
        "print(sorted({'matplotlib', 'rich', 'scipy'} & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    import deep_delta.report

    for name in deep_delta.report.__all__:
        assert getattr(deep_delta.report, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = deep_delta.report.no_such_name
