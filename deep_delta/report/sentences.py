"""What a comparison found, in sentences."""

from collections.abc import Mapping
from typing import Any

from deep_delta.report import numbers

Summary = Mapping[str, Any]

_WORDS = {1: "one seed", 2: "two seeds"}
_SPLITS = {"val_loss": "val", "test_loss": "test"}
_TEXTS = {"val_loss": "validation", "test_loss": "test"}


def judged_split(summary: Summary) -> str:
    """``val`` or ``test``: the text whose losses are compared."""
    return _SPLITS[summary["judged_on"]]


def judged_loss(summary: Summary, arm: str) -> float | None:
    """Mean loss of an arm on the text whose losses are compared; None where a run diverged."""
    (entry,) = (entry for entry in summary["arms"] if entry["arm"] == arm)
    mean: float | None = entry[summary["judged_on"]]["mean"]
    return mean


def interval_name(summary: Summary) -> str:
    """``95 % Bonferroni CI``."""
    return f"{100 * summary['level']:g} % Bonferroni CI"


def common_reference(summary: Summary) -> str | None:
    """The arm that all contrasts are against; None without contrasts, and where they differ."""
    references = {contrast["reference"] for contrast in summary["contrasts"]}
    return references.pop() if len(references) == 1 else None


def judged_text(summary: Summary) -> str:
    """One sentence on the text whose losses are compared, and on what was chosen by it."""
    if summary["judged_on"] == "test_loss":
        return "Judged on test text, on which nothing was chosen."
    if summary["rates"]:
        return "Judged on validation text, on which rates were chosen too."
    return "Judged on validation text."


def judged_by(summary: Summary) -> str:
    """One sentence on what stands behind intervals and verdicts; empty without contrasts."""
    count, residual = len(summary["contrasts"]), summary["residual"]
    if not count:
        return ""
    over = "one contrast" if count == 1 else f"{count} contrasts"
    all_hold = f"{100 * summary['level']:g} % that all hold"
    sentence = f"Intervals are Bonferroni's over {over} ({all_hold}), verdicts are Holm's"
    if residual["deviation"] is None:
        return f"{sentence}."
    deviation = f"{residual['deviation']:.{numbers.decimals_for(residual['deviation'])}f}"
    freedom = residual["degrees_of_freedom"]
    return f"{sentence}; residual deviation {deviation} nats/token ({freedom} degrees of freedom)."


def speed_ratio(summary: Summary, name: str, reference: str | None) -> float | None:
    """Tokens per second of an arm over those of another.

    From the benchmark where it has a ratio for both, else from the runs. None if the other was
    not run, and where not all their runs had the same hardware.
    """
    if reference is None:
        return None
    measured = (summary["speed"] or {"arms": {}})["arms"]
    ratios = [measured.get(arm, {"ratio": None})["ratio"] for arm in (name, reference)]
    if all(ratios):
        return float(ratios[0]) / float(ratios[1])
    entries = {entry["arm"]: entry for entry in summary["arms"]}
    if reference not in entries:
        return None
    one, other = entries[name], entries[reference]
    if len({*one["hardware"], *other["hardware"]}) > 1:
        return None
    speeds = one["tokens_per_s"], other["tokens_per_s"]
    return speeds[0] / speeds[1] if all(map(numbers.is_finite, speeds)) and speeds[1] > 0 else None


def conclusions(summary: Summary) -> list[str]:
    """What each contrast says; without contrasts one line per arm but the baseline."""
    entries = {entry["arm"]: entry for entry in summary["arms"]}
    if not summary["contrasts"]:
        return [
            f"{name}: {_alone(summary, name)}{_edge(entry, 'Its best rate')}"
            for name, entry in entries.items()
            if name != summary["baseline"]
        ]
    found = []
    for contrast in summary["contrasts"]:
        arm, reference = contrast["arm"], contrast["reference"]
        edges = _edge(entries[arm], "Its best rate")
        edges += _edge(entries[reference], f"The best rate of {reference},", ",")
        found.append(f"{arm}: {_conclusion(summary, contrast)}{edges}")
    return found


def _edge(entry: Mapping[str, Any], subject: str, comma: str = "") -> str:
    """A warning where the search's best rate has no neighbour on one side; else nothing."""
    if entry["edge"] is None:
        return ""
    further = {"highest": "higher", "lowest": "lower"}[entry["edge"]]
    return (
        f" {subject} {numbers.learning_rate(entry['lr'])}{comma} is the {entry['edge']} that was "
        f"tried: it may do better at a {further} one."
    )


_DIVERGED = "diverged (at least one run ended with a loss that is not a number): no verdict."


def _alone(summary: Summary, arm: str) -> str:
    loss = judged_loss(summary, arm)
    if not numbers.is_finite(loss):
        return _DIVERGED
    text = _TEXTS[summary["judged_on"]]
    shown = numbers.measured(loss, None, 4)
    return f"{text} loss {shown}; nothing was run to compare it with."


def _conclusion(summary: Summary, contrast: Mapping[str, Any]) -> str:
    reference, n, mean = contrast["reference"], contrast["n"], contrast["mean"]
    if not numbers.is_finite(judged_loss(summary, contrast["arm"])):
        return _DIVERGED
    if n == 0:
        return f"no seed in common with {reference}: no comparison."
    if not numbers.is_finite(mean):
        return f"not compared, because a run of {reference} diverged: no verdict."
    ratio = speed_ratio(summary, contrast["arm"], reference)
    speed = "" if ratio is None else f" at {ratio:.2f}{numbers.TIMES} its tokens/s"
    low, high = contrast["bonferroni_low"], contrast["bonferroni_high"]
    decimals = numbers.decimals_for(mean, low, high)
    size = f"{abs(mean):.{decimals}f}"
    compared = f"{size} {'lower' if mean < 0 else 'higher'} than {reference}"
    if low is None or high is None:
        count = _WORDS.get(n, numbers.seeds(n))
        return f"{compared}{speed}, but only {count}: no interval, no verdict."
    span = f"{numbers.signed(low, decimals)} to {numbers.signed(high, decimals)}"
    found = f"{interval_name(summary)} {span}, {numbers.p_value(contrast['holm_p'])} by Holm"
    if contrast["verdict"] in ("lower", "higher"):
        return f"{compared} ({found}){speed}."
    noise = f"within noise of {reference} ({found}){speed}"
    if contrast["n_to_decide"] is None:
        return f"{noise}."
    return f"{noise}; {numbers.seeds(contrast['n_to_decide'])} would decide a difference of {size}."
