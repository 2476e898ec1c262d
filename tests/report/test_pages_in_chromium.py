"""The report pages in a real browser: no errors, every plot drawn, nothing loaded."""

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report.evaluation_helpers import make_evaluation

from deep_delta.report import write_report
from deep_delta.report.evaluation import write_evaluation
from deep_delta.report.style import DARK_BACKGROUND, LIGHT_BACKGROUND

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SCHEMES = {"dark": (0, DARK_BACKGROUND), "light": (1, LIGHT_BACKGROUND)}
PHONE = 390  # CSS pixels

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")

# Added to a copy of the page: what the browser made of it becomes its title.
ASK = """<script>addEventListener("load", () => {
  const drawn = [...document.querySelectorAll("svg")].map(svg => {
    const box = svg.getBoundingClientRect();
    const inside = [...svg.querySelectorAll("path, use, text")].map(e => e.getBoundingClientRect());
    return {width: box.width, height: box.height, shapes: inside.filter(r => r.width + r.height)
      .filter(r => r.left >= box.left - 2 && r.right <= box.right + 2).length};
  });
  const back = getComputedStyle(document.body).backgroundColor;
  document.body.style.width = "%dpx";
  const wide = document.body.scrollWidth;
  const loaded = performance.getEntriesByType("resource").map(entry => entry.name);
  document.title = JSON.stringify({drawn, back, wide, loaded});
});</script></body>"""


def look_at(page: Path, scheme: int) -> tuple[dict[str, Any], list[str]]:
    """What `ASK` found on the page, and the lines of the console."""
    copy = page.with_name("asked.html")
    text = page.read_text(encoding="utf-8")
    copy.write_text(text.replace("</body>", ASK % PHONE), encoding="utf-8")
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless=new", "--disable-gpu", "--no-first-run",
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
            f"--user-data-dir={page.parent / 'browser'}", "--disable-background-networking",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--blink-settings=preferredColorScheme={scheme}",
            "--window-size=1280,900", "--enable-logging=stderr", "--dump-dom", copy.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(html.unescape(title.group(1))), console


def rgb(colour: str) -> str:
    return f"rgb({', '.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))})"


@pytest.fixture(params=["compare", "eval"])
def page(request, tmp_path: Path, summary_of: Callable, curves_of: Callable) -> tuple[Path, int]:
    """A page and how many plots it has."""
    if request.param == "eval":
        return write_evaluation(make_evaluation(), tmp_path), 2
    losses = {"additive": {1: 3.30, 2: 3.31, 3: 3.29}, "ddl-cc": {1: 3.28, 2: 3.29, 3: 3.268}}
    return write_report(summary_of(losses), curves_of(losses), tmp_path), 3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_page_in_the_browser(page: tuple[Path, int], scheme: str) -> None:
    path, plots = page
    number, background = SCHEMES[scheme]
    found, console = look_at(path, number)
    assert console == []
    assert found["loaded"] == []
    assert found["back"] == rgb(background)
    assert found["wide"] <= PHONE
    assert len(found["drawn"]) == plots
    for drawing in found["drawn"]:
        assert drawing["width"] > 300
        assert drawing["height"] > 100
        assert drawing["shapes"] > 20


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
