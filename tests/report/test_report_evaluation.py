"""The page of an evaluation, without a browser."""

import re
from pathlib import Path

from report.evaluation_helpers import make_evaluation
from test_report_html import Page

from deep_delta.report.evaluation import print_evaluation, write_evaluation


def test_page_is_whole_self_contained_and_accessible(tmp_path: Path) -> None:
    text = write_evaluation(make_evaluation(), tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"https?://", text)
    assert all(load.startswith("#") and load[1:] in page.ids for load in page.loads)
    assert page.inside_svgs == ["title", "desc"] * 2
    words = "".join(page.words)
    assert "<b>x" in words
    assert "28.90 ± 1.51" in words  # ARC-Challenge, 0-shot, by acc_norm
    assert "27.90" in words  # the paper's
    assert "+1.00 ± 1.51" in words
    assert "Table 7" in words
    assert "Table 1," in words
    assert "509 documents" in words
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.html", *(f"scores-{n}-shot.{kind}" for n in (0, 1) for kind in ("png", "svg")),
    }  # fmt: skip


def test_without_a_row_of_the_paper_there_is_nothing_beside(tmp_path: Path) -> None:
    summary = make_evaluation("write-only-cc", "medium")
    assert [average["paper"] for average in summary["averages"]] == [None, None]
    text = write_evaluation(summary, tmp_path).read_text(encoding="utf-8")
    assert "hollow" not in text.lower()


def test_loss_alone_and_printed(tmp_path: Path, capsys) -> None:
    summary = make_evaluation(tasks=[], averages=[])
    text = write_evaluation(summary, tmp_path).read_text(encoding="utf-8")
    assert "<svg" not in text
    assert "lm-evaluation-harness" not in text
    print_evaluation(summary)
    assert "loss (nats/token): 2.9000 [2.8500, 2.9600]" in capsys.readouterr().out
    print_evaluation(make_evaluation())
    assert "ARC-Challenge" in capsys.readouterr().out
