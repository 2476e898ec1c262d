"""Numbers as the table, the charts and the sentences print them."""

import math
from collections.abc import Mapping
from typing import Any

MINUS = "\u2212"
TIMES = "\u00d7"
DIVERGED_CELL = "diverged"
MISSING_CELL = "\u2013"

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def is_finite(value: float | None) -> bool:
    """False for None as well: JSON has no NaN, so a diverged loss may come back as null."""
    return value is not None and math.isfinite(value)


def signed(value: float, decimals: int) -> str:
    """``value`` with an explicit sign, a true minus sign, and no sign for what rounds to zero."""
    if float(f"{value:.{decimals}f}") == 0.0:
        return f"{0.0:.{decimals}f}"
    return f"{value:+.{decimals}f}".replace("-", MINUS)


def decimals_for(*values: float | None) -> int:
    """Four decimals, or as many more (up to six) as keep the smallest non-zero value from 0.0000.

    An interval that ends at -0.00003 excludes zero, and has to look as if it did.
    """
    sizes = [abs(value) for value in values if value is not None and is_finite(value) and value]
    if not sizes:
        return 4
    return min(6, max(4, -math.floor(math.log10(min(sizes)))))


def measured(mean: float | None, spread: float | None, decimals: int) -> str:
    """``mean ± spread``; the mean alone without a spread; "diverged" when it is not finite."""
    if mean is None or not is_finite(mean):
        return DIVERGED_CELL
    text = f"{mean:,.{decimals}f}"
    if spread is None or not is_finite(spread):
        return text
    return f"{text} ± {spread:,.{decimals}f}"


def difference_with_interval(contrast: Mapping[str, Any]) -> str:
    """``mean [low, high]``, or the difference with what keeps it from having an interval."""
    mean, n = contrast["mean"], contrast["n"]
    low, high = contrast["bonferroni_low"], contrast["bonferroni_high"]
    if n == 0:
        return "no common seed"
    if not is_finite(mean):
        return DIVERGED_CELL
    decimals = decimals_for(mean, low, high)
    if low is None or high is None:
        return f"{signed(mean, decimals)} ({seeds(n)}, no interval)"
    return f"{signed(mean, decimals)} [{signed(low, decimals)}, {signed(high, decimals)}]"


def seeds(n: int) -> str:
    """``1 seed``, ``2 seeds``."""
    return f"{n:,} seed" if n == 1 else f"{n:,} seeds"


def p_value(p: float) -> str:
    """``p = 0.031``, with two digits of what is below 0.1; ``p < 0.0001``."""
    if p < 0.0001:
        return "p < 0.0001"
    return f"p = {p:.2f}" if p >= 0.1 else f"p = {p:.{1 - math.floor(math.log10(p))}f}"


def learning_rate(lr: float) -> str:
    """``4e-3``, ``1.25e-4``: at most three digits and a power of ten."""
    digits, exponent = f"{lr:.2e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"


def with_prefix(value: float) -> str:
    """A count with three significant digits and an SI prefix: ``124 M``, ``1.20 G``."""
    if not math.isfinite(value):
        return MISSING_CELL
    for size, prefix in _PREFIXES:
        if abs(value) >= size:
            scaled = value / size
            return f"{scaled:.{2 if abs(scaled) < 10 else 1 if abs(scaled) < 100 else 0}f} {prefix}"
    return f"{value:.0f}"


def rate(value: float) -> str:
    """Tokens per second, in whole tokens from ten upwards."""
    if not math.isfinite(value):
        return MISSING_CELL
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def memory(size: int | None) -> str:
    """Bytes as MiB or GiB; nothing measured (None or 0) is a dash, not a zero."""
    if not size:
        return MISSING_CELL
    mebibytes = size / 2**20
    if mebibytes >= 1024:
        return f"{mebibytes / 1024:.2f} GiB"
    return f"{mebibytes:.0f} MiB" if mebibytes >= 10 else f"{mebibytes:.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds as ``41 s``, ``12 min 05 s`` or ``3 h 20 min``."""
    if not math.isfinite(seconds):
        return MISSING_CELL
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
