"""The commands of docs/pretraining.md exist, and its figures follow from the speeds beside them."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from helpers import REPO

from deep_delta.compare import parse_arm, read_study
from deep_delta.train import Recipe, load_recipe, merge, parse_overrides
from deep_delta_cli import COMPARE_DEFAULTS
from deep_delta_options import parse

TEXT = (REPO / "docs" / "pretraining.md").read_text(encoding="utf-8")
SLURM = "slurm.sh"
HOURS = {"1 B": 2_035, "5 B": 10_173, "49.15 B": 100_000}


def commands() -> list[list[str]]:
    """The words of what the shell blocks run of this library, launchers left out."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").replace("$model", "ddl-cc").splitlines():
            words = shlex.split(line.replace("$seed", "1"), comments=True)
            words = ["ddl", "train", *words[2:]] if SLURM in words else words
            if "ddl" in words:
                found.append(words[words.index("ddl") + 1 :])
    return found


def recipe_of(words: list[str]) -> Recipe:
    options, rest = parse(["train", *words])
    return merge(load_recipe(*options.recipes), parse_overrides(rest))


def test_every_command_is_understood():
    kinds = {words[0] for words in commands()}
    assert kinds == {"prepare", "bench", "train", "compare"}
    for words in commands():
        if words[0] == "train":
            recipe_of(words[1:])
        elif words[0] != "compare":
            _, unknown = parse(words)
            assert not unknown


def test_the_comparison_takes_the_runs_trained_before_it():
    (compared,) = (words for words in commands() if words[0] == "compare")
    options, rest = parse(compared)
    out = parse_overrides(rest)["out"]
    (trained,) = (
        recipe_of(words[1:]) for words in commands() if words[0] == "train" and out in words
    )
    assert trained.variant in options.variants.split(",")
    assert str(trained.seed) in options.seeds.split(",")
    study = read_study(options.recipes, {}, parse_overrides(rest), COMPARE_DEFAULTS)
    fields = dataclasses.replace(study.recipe_of(parse_arm(trained.variant)), seed=trained.seed)
    assert not fields.differences(trained)
    assert fields.run_folder == trained.run_folder


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((\.\./[^)]*|[^)/:]*\.md)\)", TEXT))))
def test_links_lead_somewhere(path):
    assert (REPO / "docs" / Path(path)).exists()


def test_hours_and_costs_follow_from_the_speeds():
    rows = re.findall(r"^\|.*\| \*?(\d+) K\*? \|(.*)\|$", TEXT, re.MULTILINE)
    assert len(rows) == 8
    for speed, cells in rows:
        hours = [steps * 480 * 1024 / (float(speed) * 3.6e6) for steps in HOURS.values()]
        expected = [*hours, hours[-1] / 8, hours[-1] * 2.5]
        shown = [cell.strip().removesuffix(" h") for cell in cells.split("|")]
        for text, value in zip(shown, expected, strict=True):
            digits = len(text.partition(".")[2])
            assert float(text) == pytest.approx(value, abs=0.51 * 10**-digits)
