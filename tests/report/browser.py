"""What a real browser makes of a report page, for tests."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from deep_delta.report.style import DARK_BACKGROUND, LIGHT_BACKGROUND

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SCHEMES = {"dark": (0, DARK_BACKGROUND), "light": (1, LIGHT_BACKGROUND)}
PHONE = 390  # CSS pixels

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")

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
  const cut = [...document.querySelectorAll("svg")].filter(svg => {
    const box = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map(e => e.getBoundingClientRect());
    return box.right > %d || texts.some(r => r.left < box.left || r.right > box.right);
  }).length;
  const loaded = performance.getEntriesByType("resource").map(entry => entry.name);
  document.title = JSON.stringify({drawn, back, wide, cut, loaded});
});</script></body>"""


def look_at(page: Path, scheme: int) -> tuple[dict[str, Any], list[str]]:
    """What `ASK` found on the page, and the lines of the console."""
    copy = page.with_name("asked.html")
    text = page.read_text(encoding="utf-8")
    copy.write_text(text.replace("</body>", ASK % (PHONE, PHONE)), encoding="utf-8")
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


def check_page(path: Path, plots: int, scheme: str) -> None:
    """No errors, every plot drawn, nothing loaded, no wider than a phone; `scheme`: of SCHEMES."""
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
