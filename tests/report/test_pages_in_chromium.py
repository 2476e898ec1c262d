"""The report pages in a real browser: no errors, every plot drawn, nothing loaded."""

from pathlib import Path

import pytest
from report.browser import PHONE, SCHEMES, check_page, look_at, needs_chromium
from report.comparison_helpers import (
    make_curves,
    make_summary,
    with_budgets,
    with_search,
    with_speed,
)
from report.evaluation_helpers import make_evaluation

from deep_delta.report import write_report
from deep_delta.report.evaluation import write_evaluation

pytestmark = needs_chromium


@pytest.fixture(params=["compare", "eval"], scope="module")
def page(request, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A page and how many plots it has."""
    folder = tmp_path_factory.mktemp("page")
    if request.param == "eval":
        return write_evaluation(make_evaluation(), folder), 2
    names = ["additive", "ddl-cc", '<b>&"', "x" * 60, "many words " * 6]
    losses = {
        name: {
            seed: 3.3 - 0.01 * place + 0.01 * seed + 0.001 * (seed == place) for seed in range(3)
        }
        for place, name in enumerate(names)
    }
    summary = with_speed(with_budgets(with_search(make_summary(losses, tested=True))))
    return write_report(summary, make_curves(losses), folder), 6


@pytest.mark.parametrize("scheme", SCHEMES)
def test_page_in_the_browser(page: tuple[Path, int], scheme: str) -> None:
    check_page(*page, scheme)


def test_charts_fit_a_phone_with_all_their_text(page: tuple[Path, int]) -> None:
    found, _ = look_at(page[0], 1)
    assert found["cut"] == 0


def test_the_browser_would_notice(tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text(
        '<body><img src="http://elsewhere.invalid/x.png"><script>nothing.at.all</script>'
        f'<div style="width: {2 * PHONE}px">wide</div><svg width="300" height="200">'
        '<text x="-50" y="20">cut off</text></svg></body>'
    )
    path.write_text("<title></title>" + path.read_text())
    found, console = look_at(path, 1)
    assert any("nothing is not defined" in line for line in console)
    assert any("ERR_NAME_NOT_RESOLVED" in line for line in console) or found["loaded"]
    assert found["wide"] > PHONE
    assert found["drawn"][0]["shapes"] == 0
    assert found["cut"] == 1
