"""Rebuilds the two tables in README.md and the plot from rows.jsonl and earlier.jsonl: python3 report.py"""

import json
import re
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
SMALL, NOISE = "+rgain=1+cinit=published", "+ec=1+noise=0.5"
RATE = "8e-3"  # of all forms in the table, the contrasts and the plot; other rates have a table of their own
DIVERGED = 4.0  # nats: off the plot, in the table
# What is changed: from the second form to the first, everything else equal unless the line says so.
CONTRASTS = [
    ("First writes shorter, additive: from 0.03", "additive+bnorm=0.03", "additive+bnorm=0.1"),
    ("First writes shorter, additive: from 0.01", "additive+bnorm=0.01", "additive+bnorm=0.1"),
    ("First writes shorter, additive: from 0.001", "additive+bnorm=0.001", "additive+bnorm=0.1"),
    ("Token's gate, additive from 0.01", "additive+bnorm=0.01+tgate=1", "additive+bnorm=0.01"),
    ("Token's gate, additive from 0.03", "additive+bnorm=0.03+tgate=1", "additive+bnorm=0.03"),
    ("Token's gate, additive, small read, EC, noise", "additive+bnorm=0.01" + SMALL + NOISE + "+tgate=1", "additive+bnorm=0.01" + SMALL + NOISE),
    ("Cooler logit, mended as it is", "mended+dv=1+zscale=0.01", "mended+dv=1"),
    ("Target from the token, small read", "writeonly+dv=1" + SMALL, "writeonly+dv=1" + SMALL + "+zscale=0"),
    ("ε at 1e-5, not 1e-8 (gates' scale too)", "mended+dv=1" + SMALL, "mended+dv=1" + SMALL + "+eps=1e-8"),
    ("EC and noise, mended, small read", "mended+dv=1" + SMALL, "mended+dv=1" + SMALL + "+ec=0+noise=0"),
    ("EC and noise, write-only, zscale=0", "writeonly+dv=1+zscale=0", "writeonly+dv=1+zscale=0+ec=0+noise=0"),
    ("EC and noise, additive from 0.01", "additive+bnorm=0.01" + NOISE, "additive+bnorm=0.01"),
    ("EC beside noise, write-only, small read", "writeonly+dv=1" + SMALL, "writeonly+dv=1" + SMALL + "+ec=0+noise=0.5"),
    ("EC beside noise, additive, small read", "additive+bnorm=0.01" + SMALL + NOISE, "additive+bnorm=0.01" + SMALL + "+ec=0+noise=0.5"),
    ("EC beside noise, write-only, kgain", "writeonly+dv=1" + SMALL + "+kgain=1", "writeonly+dv=1" + SMALL + "+kgain=1+ec=0+noise=0.5"),
    ("Noise beside EC, write-only, small read", "writeonly+dv=1" + SMALL, "writeonly+dv=1" + SMALL + "+noise=0"),
    ("Noise beside EC, additive, small read", "additive+bnorm=0.01" + SMALL + NOISE, "additive+bnorm=0.01" + SMALL + "+ec=1"),
    ("kgain, write-only, small read, EC, noise", "writeonly+dv=1" + SMALL + "+kgain=1", "writeonly+dv=1" + SMALL),
    ("kgain, write-only, small read, noise alone", "writeonly+dv=1" + SMALL + "+kgain=1+ec=0+noise=0.5", "writeonly+dv=1" + SMALL + "+ec=0+noise=0.5"),
    ("Small read, mended, cool logit", "mended+dv=1" + SMALL, "mended+dv=1+zscale=0.01"),
    ("Small read, write-only, zscale=0", "writeonly+dv=1" + SMALL + "+zscale=0", "writeonly+dv=1+zscale=0"),
    ("Small read, additive from 0.01, EC, noise", "additive+bnorm=0.01" + SMALL + NOISE, "additive+bnorm=0.01" + NOISE),
    ("Small read, EC, noise, additive from 0.1", "additive+bnorm=0.1" + SMALL + NOISE, "additive+bnorm=0.1"),
    ("DDL's write, all else equal: mended", "mended+dv=1" + SMALL, "additive+bnorm=0.01" + SMALL + NOISE),
    ("DDL's write, all else equal: write-only", "writeonly+dv=1" + SMALL, "additive+bnorm=0.01" + SMALL + NOISE),
    ("Erase: mended less write-only", "mended+dv=1" + SMALL, "writeonly+dv=1" + SMALL),
    ("Pilot's gap: mended less additive from 0.1", "mended+dv=1" + SMALL, "additive+bnorm=0.1"),
    ("write-only less additive from 0.01, EC, noise", "writeonly+dv=1" + SMALL, "additive+bnorm=0.01" + NOISE),
    ("mended less additive from 0.01, EC, noise", "mended+dv=1" + SMALL, "additive+bnorm=0.01" + NOISE),
]  # fmt: skip


def read() -> tuple[dict[str, list[dict]], dict[tuple[str, str], list[dict]]]:
    """The rows at RATE by form, and those at other rates by form and rate."""
    forms, others = defaultdict(list), defaultdict(list)
    for name in ("earlier.jsonl", "rows.jsonl"):
        for line in (HERE / name).read_text().splitlines():
            row = json.loads(line)
            form, _, rest = row["spec"].partition("@")
            rate = rest.partition("#")[0]
            if float(rate) == float(RATE):
                forms[form].append(row)
            else:
                others[form, rate].append(row)
    return forms, others


def mean(rows: list[dict], key: str = "val") -> float:
    return statistics.mean(row[key] for row in rows)


def logged(rows: list[dict], key: str, start: bool = False) -> float | None:
    """Mean over sublayers and seeds, before step 1 or at the end; None where it was not logged."""
    rows = [row for row in rows if "inside" in row]
    places = [place for row in rows for place in (row["inside_during"]["0"] if start else row["inside"])]
    found = [place[key] for place in places if key in place]
    return statistics.mean(found) if found else None


def extras(form: str) -> str:
    """Which of EC and noise a form has; DDL's forms have both unless they say otherwise."""
    additive = form.startswith("additive")
    conv = "ec=1" in form or (not additive and "ec=0" not in form)
    noise = "noise=0.5" in form or (not additive and "noise=0" not in form)
    return {(True, True): "yes", (True, False): "EC", (False, True): "noise", (False, False): ""}[conv, noise]


def with_noise(form: str) -> bool:
    return extras(form) == "yes"


def table(forms: dict[str, list[dict]]) -> str:
    lines = [
        "| form | EC, noise | seeds | val, all 960 | largest − smallest | val, first 480 | first writes "
        "| writes at the end | amplitude varies, at the end | gate varies, at first |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    figure = lambda x: "" if x is None else f"{x:.4f}" if x < 0.01 else f"{x:.2f}"  # noqa: E731
    for form, rows in sorted(forms.items(), key=lambda item: mean(item[1])):
        vals = [row["val"] for row in rows]
        cells = [f"`{form}`", extras(form), len(rows)]
        cells += [f"{mean(rows):.4f}", f"{max(vals) - min(vals):.4f}" if len(vals) > 1 else ""]
        cells += [f"{mean(rows, 'val_480'):.4f}", figure(logged(rows, "length", True))]
        cells += [figure(logged(rows, "length")), figure(logged(rows, "product_varies"))]
        cells += [figure(logged(rows, "beta_varies", True))]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def rates(forms: dict[str, list[dict]], others: dict[tuple[str, str], list[dict]]) -> str:
    """Forms that have a second rate, at each of their rates; beside it the difference from RATE, where the form has it."""
    lines = ["| form | rate | seeds | val, all 960 | val, first 480 | less the same at " + RATE + " |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    deviation = pooled_deviation(forms)
    for form in dict.fromkeys(form for form, _ in others):
        base = forms.get(form, [])
        groups = [(rate, rows) for (name, rate), rows in others.items() if name == form] + ([(RATE, base)] if base else [])
        for rate, rows in sorted(groups, key=lambda group: float(group[0])):
            apart = ""
            if base and rows is not base:
                apart = f"{mean(rows) - mean(base):+.4f} ± {deviation * (1 / len(rows) + 1 / len(base)) ** 0.5:.4f}"
            lines.append(f"| `{form}` | {rate} | {len(rows)} | {mean(rows):.4f} | {mean(rows, 'val_480'):.4f} | {apart} |")
    return "\n".join(lines)


def pooled_deviation(forms: dict[str, list[dict]]) -> float:
    groups = [[row["val"] for row in rows] for rows in forms.values() if len(rows) > 1]
    squares = sum(statistics.variance(vals) * (len(vals) - 1) for vals in groups)
    return (squares / sum(len(vals) - 1 for vals in groups)) ** 0.5


def differences(forms: dict[str, list[dict]]) -> list[tuple[str, float, float, int, int]]:
    """(what, difference of means, its standard error, seeds of both), where both were trained."""
    found, deviation = [], pooled_deviation(forms)
    for what, new, old in CONTRASTS:
        if new in forms and old in forms:
            a, b = len(forms[new]), len(forms[old])
            error = deviation * (1 / a + 1 / b) ** 0.5
            found.append((what, mean(forms[new]) - mean(forms[old]), error, a, b))
    return found


def plot(forms: dict[str, list[dict]]) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 6), width_ratios=(1.1, 1, 1), layout="constrained")
    rows = differences(forms)[::-1]
    left.axvspan(-0.02, 0.02, color="0.92")
    for place, (_, difference, error, *_) in enumerate(rows):
        left.errorbar(difference, place, xerr=2 * error, fmt="o", color="C0" if difference < 0 else "C1", capsize=3)
    left.set(yticks=range(len(rows)), yticklabels=[f"{what}  ({a}, {b})" for what, _, _, a, b in rows])
    left.set(xlabel="change of val, nats (± 2 standard errors)\ngrey: says nothing yet", title="What is changed (seeds)")
    panels = (middle, "length", True, "length of a write / of the state, before step 1"), (right, "product_varies", False, "how much β·v varies over tokens, at the end")  # fmt: skip
    for axis, key, start, label in panels:
        for form, group in forms.items():
            additive, small = form.startswith("additive"), SMALL in form
            x = logged(group, key, start)
            if x is None and key == "product_varies" and "tgate" not in form:
                x = 0.0  # additive without a gate: no amplitude of a token's own
            if x is None or mean(group) > DIVERGED:
                continue
            color = "C2" if with_noise(form) else "C3"
            marker = {"marker": "o" if additive else "s", "ms": 8, "mfc": color if small else "none", "mec": color}
            for row in group:
                axis.plot(max(x, 2e-4) if start else x, row["val"], ls="", **marker)
        axis.set(xlabel=label, ylabel="val, nats, all 960 sequences")
    middle.set(xscale="log", title="Length of first writes (0: at 2e-4)")
    right.set(title="A token's amplitude")
    for name, marker, face, color in [
        ("additive", "o", "none", "0.3"), ("d_v = 1 (DDL's write)", "s", "none", "0.3"), ("filled: read from 0.01", "s", "0.3", "0.3"),
        ("EC with noise", "o", "C2", "C2"), ("without", "o", "C3", "C3"),
    ]:  # fmt: skip
        middle.plot([], [], ls="", marker=marker, mfc=face, mec=color, label=name)
    middle.legend(fontsize=8, loc="lower right")
    figure.suptitle("No candidate alone makes the gain: it needs EC with noise (green) and the small read (filled) together")
    for suffix in ("png", "svg"):
        figure.savefig(HERE / f"what-makes-the-gain.{suffix}", dpi=110, metadata={"Date": None} if suffix == "svg" else None)


def main() -> None:
    forms, others = read()
    lines = [f"{what}: {difference:+.4f} ± {error:.4f} ({a}, {b} seeds)" for what, difference, error, a, b in differences(forms)]
    print(f"pooled standard deviation of a seed {pooled_deviation(forms):.4f}", *lines, sep="\n")
    readme = HERE / "README.md"
    text = readme.read_text()
    for name, content in ("table", table(forms)), ("rates", rates(forms, others)):
        block = f"<!-- {name}: report.py -->\n{content}\n<!-- end of {name} -->"
        text = re.sub(rf"<!-- {name}: report.py -->.*?<!-- end of {name} -->", lambda _, block=block: block, text, flags=re.DOTALL)
    readme.write_text(text)
    plot(forms)


if __name__ == "__main__":
    main()
