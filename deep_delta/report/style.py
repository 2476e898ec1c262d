"""One look for every chart: a fixed colour, line style and marker per variant.

Every colour keeps a contrast of at least 3:1 both on white and on the dark page background (the
tests check it), so that one drawing serves both. Eleven hues cannot all be told apart by a
colour-blind reader, so the families differ by hue and their members by dash and marker as well.
"""

import zlib
from dataclasses import dataclass

LIGHT_BACKGROUND = "#ffffff"
DARK_BACKGROUND = "#15171c"

# Text, axes and grid. A value that no variant uses: the inline SVG replaces it by currentColor.
INK = "#1b1d21"

Dash = tuple[float, tuple[float, ...]] | str
SOLID: Dash = "-"
DASHED: Dash = (0, (5, 2))
DOTTED: Dash = (0, (1.2, 1.6))
DASH_DOT: Dash = (0, (6, 2, 1.2, 2))


@dataclass(frozen=True)
class VariantStyle:
    """How one variant is drawn: hex colour, matplotlib line style and marker, label text."""

    colour: str
    dash: Dash
    marker: str
    label: str


_KNOWN: dict[str, tuple[str, Dash, str]] = {
    "additive": ("#7f7f7f", SOLID, "o"),
    "additive-expanded": ("#a8762a", SOLID, "s"),
    "additive-ec": ("#8a8368", DASHED, "D"),
    "write-only-scalar": ("#d0628f", DOTTED, "v"),
    "write-only-cc": ("#d55e00", SOLID, "^"),
    "write-only-tc": ("#c9515c", DASH_DOT, "<"),
    "ddl-scalar": ("#12946c", SOLID, "P"),
    "ddl-tc-no-ec": ("#9a79d1", DASHED, "X"),
    "ddl-cc-no-ec": ("#3d96c9", DASHED, "h"),
    "ddl-tc": ("#7d57c2", SOLID, "d"),
    "ddl-cc": ("#0f76bd", SOLID, "*"),
}

FALLBACK_COLOURS = ("#6f8f2f", "#1f9098", "#b05fc0", "#b5651d", "#5b7db8", "#c2567a")
_FALLBACK_MARKERS = ("p", "H", ">", "8")

KNOWN_VARIANTS = tuple(_KNOWN)


def variant_style(variant: str) -> VariantStyle:
    """Style of a variant; an unknown name gets one derived from the name alone.

    The label is the name as the user types it, so that chart, table and command line agree.
    """
    if variant in _KNOWN:
        colour, dash, marker = _KNOWN[variant]
        return VariantStyle(colour, dash, marker, variant)
    # crc32 and not hash(): the latter differs from process to process.
    code = zlib.crc32(variant.encode("utf-8"))
    colour = FALLBACK_COLOURS[code % len(FALLBACK_COLOURS)]
    marker = _FALLBACK_MARKERS[code // len(FALLBACK_COLOURS) % len(_FALLBACK_MARKERS)]
    return VariantStyle(colour, DASH_DOT, marker, variant)
