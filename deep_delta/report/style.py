"""One look for every chart: a fixed colour, line style and marker per variant, one per arm.

Every colour keeps a contrast of at least 3:1 both on white and on the dark page background (the
tests check it), so that one drawing serves both. Eleven hues cannot all be told apart by a
colour-blind reader, so the families differ by hue and their members by dash and marker as well.
"""

import zlib
from collections.abc import Iterable
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
    """How one variant or arm is drawn: hex colour, matplotlib line style and marker, label text."""

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

# For a comparison's arms that are not called like a variant, in their order. Twelve of each.
_ARM_COLOURS = (
    *FALLBACK_COLOURS, "#6c6c54", "#00780c", "#6054d8", "#f06048", "#8478fc", "#a88484"
)  # fmt: skip
_ARM_MARKERS = ("o", "s", "^", "D", "v", "P", "<", "X", "p", ">", "*", "d")
_ARM_DASHES = (SOLID, DASHED, DASH_DOT, DOTTED)

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


def arm_styles(arms: Iterable[str]) -> dict[str, VariantStyle]:
    """Styles of a comparison's arms, by name: all different up to twelve that are no variants.

    An arm that is called like a variant looks as that does in every report. The others go by
    their order, so that an arm added at the end changes no other's look.
    """
    styles, others = {}, 0
    for arm in arms:
        if arm in _KNOWN:
            styles[arm] = variant_style(arm)
            continue
        turn, place = divmod(others, len(_ARM_COLOURS))
        dash = _ARM_DASHES[(place + turn) % len(_ARM_DASHES)]
        styles[arm] = VariantStyle(_ARM_COLOURS[place], dash, _ARM_MARKERS[place], arm)
        others += 1
    return styles
