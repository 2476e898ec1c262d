"""The frame and the style sheet of every report page; no content."""

from string import Template

from deep_delta.report.style import DARK_BACKGROUND, LIGHT_BACKGROUND

_CSS = Template("""
:root { color-scheme: light dark; --back: $light; --text: #1b1d21; --quiet: #5a5f69;
  --line: #d9dce1; --panel: #f5f6f8; --good: #0b6b4f; --bad: #a33a06; }
@media (prefers-color-scheme: dark) {
  :root { --back: $dark; --text: #e7e9ed; --quiet: #a2a8b3; --line: #363a43; --panel: #1e2128;
    --good: #5ccfa8; --bad: #f0935c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: break-word; }
main { max-width: 84rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; text-wrap: balance; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p, ul, dl { max-width: 46rem; }
.quiet, figcaption { color: var(--quiet); font-size: .9rem; }
.conclusions { list-style: none; padding: 0; margin: 1rem 0; }
.conclusions li { padding: .55rem .9rem; margin: .4rem 0; background: var(--panel);
  border-left: 4px solid var(--quiet); border-radius: 0 4px 4px 0; overflow-wrap: anywhere; }
.conclusions .lower { border-color: var(--good); }
.conclusions .higher { border-color: var(--bad); }
.scroll { overflow-x: auto; max-width: 100%; }
.scroll:focus-visible { outline: 2px solid currentColor; outline-offset: 2px; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .55rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; white-space: normal; min-width: 5.5rem; }
th { font-weight: 600; }
.words { text-align: left; }
td.words { white-space: normal; min-width: 8rem; }
th:first-child { padding-left: 0; position: sticky; left: 0; background: var(--back); }
th.long { white-space: normal; overflow-wrap: anywhere; min-width: min(14rem, 35vw);
  max-width: min(18rem, 40vw); }
figure { margin: 0; }
figure svg { display: block; width: 100%; min-width: 30rem; max-width: 50rem; height: auto; }
figure.narrow svg { min-width: 0; max-width: 34rem; }
.charts { display: grid; gap: 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
figcaption { max-width: 46rem; margin-top: .4rem; }
summary { cursor: pointer; margin: .6rem 0; }
dt { font-weight: 600; margin-top: .6rem; }
dd { margin: 0; overflow-wrap: anywhere; }
code { font: .875em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
@media print { .conclusions li { border: 1px solid var(--line); } }
""").substitute(light=LIGHT_BACKGROUND, dark=DARK_BACKGROUND)

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$css</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")


def whole_page(title: str, body: str) -> str:
    """The page around ``body``; both are HTML already, escaped by the caller."""
    return _PAGE.substitute(title=title, css=_CSS, body=body)
