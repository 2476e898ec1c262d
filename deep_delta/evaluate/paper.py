"""The scores that the paper reports, to stand beside ours.

Source: Y. Zhang et al., "Deep Delta Learning", arXiv 2601.00417 v3: Table 1 (small, 1-shot), Table
2 (medium, 1-shot), Table 7 (small, 0-shot) and Table 8 (medium, 0-shot). Models trained on 49.15 B
tokens of FineWeb-Edu, one run each, scored by lm-evaluation-harness; in per cent, without standard
errors. The last number of a row is the paper's own average, the plain mean of the eight.
"""

SOURCE = "arXiv 2601.00417 v3"
TABLES = {("small", 1): 1, ("medium", 1): 2, ("small", 0): 7, ("medium", 0): 8}

COLUMNS = (
    "arc_challenge", "arc_easy", "hellaswag", "openbookqa", "piqa", "sciq", "social_iqa",
    "winogrande", "average",
)  # fmt: skip

# (size, shots) -> variant -> a number for each of COLUMNS.
SCORES: dict[tuple[str, int], dict[str, tuple[float, ...]]] = {
    ("small", 1): {
        "additive": (29.01, 55.85, 37.59, 30.20, 65.94, 80.60, 37.87, 51.38, 48.56),
        "ddl-scalar": (29.35, 57.49, 38.08, 31.80, 64.85, 78.50, 37.77, 52.01, 48.73),
        "ddl-tc-no-ec": (27.90, 58.16, 38.26, 30.80, 66.49, 80.30, 38.54, 50.83, 48.91),
        "ddl-cc-no-ec": (27.82, 58.92, 38.44, 33.20, 65.83, 79.50, 38.28, 51.07, 49.13),
        "ddl-tc": (28.75, 57.37, 38.41, 34.40, 64.47, 82.00, 38.38, 52.01, 49.47),
        "ddl-cc": (28.33, 57.87, 38.24, 32.20, 64.09, 82.60, 38.43, 52.57, 49.29),
    },
    ("medium", 1): {
        "additive": (33.62, 67.05, 47.42, 33.20, 70.24, 87.30, 40.28, 52.57, 53.96),
        "ddl-scalar": (35.49, 65.70, 46.94, 34.20, 70.35, 88.90, 40.99, 54.93, 54.69),
        "ddl-tc-no-ec": (33.02, 66.16, 47.83, 35.60, 69.86, 89.50, 40.99, 55.64, 54.83),
        "ddl-cc-no-ec": (34.30, 66.08, 48.65, 36.60, 68.72, 88.80, 40.84, 55.33, 54.92),
        "ddl-tc": (35.15, 65.70, 47.74, 35.40, 69.04, 88.60, 40.63, 56.59, 54.86),
        "ddl-cc": (34.39, 65.57, 48.92, 36.00, 69.48, 90.50, 40.53, 55.72, 55.14),
    },
    ("small", 0): {
        "additive": (28.33, 52.44, 37.60, 33.00, 65.94, 71.20, 37.46, 52.41, 47.30),
        "ddl-scalar": (26.96, 52.40, 37.91, 32.20, 64.91, 72.50, 38.08, 53.59, 47.32),
        "ddl-tc-no-ec": (27.30, 52.95, 38.40, 33.80, 65.40, 73.70, 38.64, 50.12, 47.54),
        "ddl-cc-no-ec": (27.05, 51.47, 38.72, 32.20, 66.16, 71.80, 38.08, 51.07, 47.07),
        "ddl-tc": (28.50, 51.89, 38.82, 33.20, 65.29, 73.00, 39.05, 52.88, 47.83),
        "ddl-cc": (27.90, 51.26, 38.42, 31.40, 64.85, 73.60, 37.77, 52.25, 47.18),
    },
    ("medium", 0): {
        "additive": (31.74, 59.85, 47.91, 34.00, 69.21, 78.10, 40.69, 53.83, 51.92),
        "ddl-scalar": (32.07, 59.39, 47.62, 34.40, 70.08, 77.30, 39.61, 55.01, 51.94),
        "ddl-tc-no-ec": (32.08, 58.38, 48.08, 35.80, 69.42, 79.90, 39.92, 54.14, 52.22),
        "ddl-cc-no-ec": (32.08, 61.74, 49.12, 34.80, 69.53, 80.20, 40.43, 55.17, 52.88),
        "ddl-tc": (33.02, 59.68, 48.00, 36.80, 68.77, 81.00, 39.82, 55.88, 52.87),
        "ddl-cc": (32.59, 59.55, 49.01, 36.00, 69.70, 82.30, 39.82, 53.83, 52.85),
    },
}


def paper_scores(variant: str, size: str, shots: int) -> dict[str, float]:
    """The paper's row by task (and "average"), in per cent; empty where it has no such row."""
    row = SCORES.get((size, shots), {}).get(variant)
    return {} if row is None else dict(zip(COLUMNS, row, strict=True))
