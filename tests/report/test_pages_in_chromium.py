"""The report pages in a real browser: no errors, every plot drawn, nothing loaded."""

from collections.abc import Callable
from pathlib import Path

import pytest
from report.browser import PHONE, SCHEMES, check_page, look_at, needs_chromium
from report.evaluation_helpers import make_evaluation

from deep_delta.report import write_report
from deep_delta.report.evaluation import write_evaluation

pytestmark = needs_chromium


@pytest.fixture(params=["compare", "eval"])
def page(request, tmp_path: Path, summary_of: Callable, curves_of: Callable) -> tuple[Path, int]:
    """A page and how many plots it has."""
    if request.param == "eval":
        return write_evaluation(make_evaluation(), tmp_path), 2
    losses = {"additive": {1: 3.30, 2: 3.31, 3: 3.29}, "ddl-cc": {1: 3.28, 2: 3.29, 3: 3.268}}
    return write_report(summary_of(losses), curves_of(losses), tmp_path), 3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_page_in_the_browser(page: tuple[Path, int], scheme: str) -> None:
    check_page(*page, scheme)


def test_the_browser_would_notice(tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text(
        '<body><img src="http://elsewhere.invalid/x.png"><script>nothing.at.all</script>'
        f'<div style="width: {2 * PHONE}px">wide</div><svg width="400" height="200"></svg></body>'
    )
    path.write_text("<title></title>" + path.read_text())
    found, console = look_at(path, 1)
    assert any("nothing is not defined" in line for line in console)
    assert any("ERR_NAME_NOT_RESOLVED" in line for line in console) or found["loaded"]
    assert found["wide"] > PHONE
    assert found["drawn"][0]["shapes"] == 0
