"""What a comparison asks: its arms, rates, seeds and contrasts, checked before it begins."""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from deep_delta.compare.arms import Arm, arm_of, parse_arm
from deep_delta.data import TokenShards
from deep_delta.errors import UserError
from deep_delta.train import Recipe, make_recipe, merge, model_config
from deep_delta.train.recipe import find_recipe, merged_fields, read_fields
from deep_delta.train.texts import find_data

T = TypeVar("T")

DEFAULT_ARMS = ("additive", "additive-expanded", "write-only-cc", "ddl-cc", "ddl-scalar")
DEFAULT_SEEDS = (0, 1, 2)
DEFAULT_BASELINE = "additive"
DEFAULT_RATE_SEED = 1000  # far from the seeds that people report
RESERVED = r"^data$|\.(json|csv|html|png|svg)$"  # what lies beside the arms' folders
# Fields of a recipe that a comparison decides, or its arms do.
DECIDED = ("variant", "seed", "resume", "name", "init")
# Of a study's YAML file, beside fields of a recipe. `lr` may be a list there.
STUDY_KEYS = (
    "arms", "variants", "baseline", "contrasts", "lr", "rate_seeds", "seeds", "budgets",
)  # fmt: skip


@dataclass(frozen=True)
class Study:
    """A comparison. UserError in one line for what does not fit, before anything trains.

    Attributes:
        recipe: what all arms share; `out` is the comparison's folder.
        arms: at least one; no two have the same name, or are the same training.
        seeds: of the runs that are reported.
        baseline: the name of an arm, or None.
        contrasts: pairs of arm names (arm, reference); empty for every arm against the baseline.
        rates: peak learning rates to try for every arm that does not set its own; of one or none
            nothing is chosen.
        rate_seeds: of the runs that choose a rate, none of which is reported.
        budgets: lengths in tokens at which the baseline is trained too, each a whole schedule.
    """

    recipe: Recipe
    arms: Sequence[Arm]
    seeds: Sequence[int] = DEFAULT_SEEDS
    baseline: str | None = None
    contrasts: Sequence[tuple[str, str]] = ()
    rates: Sequence[float] = ()
    rate_seeds: Sequence[int] = (DEFAULT_RATE_SEED,)
    budgets: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not self.arms or not self.seeds:
            raise UserError("a comparison needs at least one arm and one seed")
        names = [arm.name for arm in self.arms]
        several: dict[str, Sequence[Any]] = {
            "arms": names,
            "seeds": self.seeds,
            "lr": [f"{rate:g}" for rate in self.rates],  # as folders are called
            "rate_seeds": self.rate_seeds,
            "budgets": self.budgets,
            "contrasts": self.contrasts,
        }
        for what, chosen in several.items():
            if len(set(chosen)) != len(chosen):
                raise UserError(f"{what} has repeats: {', '.join(map(str, chosen))}")
        for seed in (*self.seeds, *self.rate_seeds):
            merge(self.recipe, {"seed": seed})
        for rate in self.rates:
            merge(self.recipe, {"lr": rate})
        common = ", ".join(map(str, sorted(set(self.seeds) & set(self.rate_seeds))))
        if self.searches and common:
            raise UserError(f"seed {common} is reported: choose rates by other rate_seeds")
        if self.searches and not self.rate_seeds:
            raise UserError("a choice of lr needs at least one rate_seed")
        for name in (self.baseline, *itertools.chain(*self.contrasts)):
            if name is not None and name not in names:
                raise UserError(f"there is no arm {name!r}; there are {', '.join(names)}")
        for arm, reference in self.contrasts:
            if arm == reference:
                raise UserError(f"{arm!r} cannot be compared with itself")
        if self.budgets and self.baseline is None:
            raise UserError("budgets are for the baseline's curve: name one by --baseline")
        self._check_arms()

    @property
    def searches(self) -> bool:
        """Whether rates are to be chosen."""
        return len(self.rates) > 1

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The contrasts, by default every arm against the baseline."""
        if self.contrasts or self.baseline is None:
            return list(self.contrasts)
        return [(arm.name, self.baseline) for arm in self.arms if arm.name != self.baseline]

    def recipe_of(self, arm: Arm) -> Recipe:
        """The arm's recipe, but for its seed, its run's name and a rate that is chosen."""
        rate = {"lr": self.rates[0]} if len(self.rates) == 1 else {}
        return arm.recipe(merge(self.recipe, {**rate, "name": arm.folder}))

    @property
    def baseline_arm(self) -> Arm | None:
        """The arm that `baseline` names."""
        return next((arm for arm in self.arms if arm.name == self.baseline), None)

    def check_budgets(self) -> None:
        """UserError for a budget that the data does not have, or that is no length of its own.

        Every process must call it: the bundled text is prepared by the main one.
        """
        if not self.budgets or self.baseline_arm is None:
            return
        recipe = self.recipe_of(self.baseline_arm)
        per_step = recipe.batch_size * recipe.seq_len
        there = len(TokenShards.open(find_data(recipe), "train", verify=False))
        for budget in self.budgets:
            if budget > there:
                raise UserError(
                    f"a budget of {budget:,} tokens is longer than the data, which has {there:,}"
                )
            if budget < per_step:
                raise UserError(
                    f"a budget of {budget:,} tokens is shorter than a step of {per_step:,}"
                )
        steps = [round(budget / per_step) for budget in self.budgets]
        if len(set(steps)) != len(steps):
            raise UserError(f"two budgets are the same number of steps of {per_step:,} tokens")

    def _check_arms(self) -> None:
        seen: dict[str, str] = {}
        folders: dict[str, str] = {}
        for arm in self.arms:
            if re.search(RESERVED, arm.folder, re.IGNORECASE):
                raise UserError(f"arm {arm.name} would have the place of a file of the comparison")
            recipe = self.recipe_of(arm)
            if recipe.batch_size % (recipe.micro_batch_size or 1):
                raise UserError(
                    f"arm {arm.name}: batch_size {recipe.batch_size} is not a multiple of "
                    f"micro_batch_size {recipe.micro_batch_size}"
                )
            try:
                config = model_config(recipe)
            except UserError as error:
                raise UserError(f"arm {arm.name}: {error}") from None
            trained = {
                **dataclasses.asdict(recipe),
                **dict.fromkeys(("name", "variant", "size", "parameterization")),
                "model": config.to_dict(),
            }
            for known, value in ((seen, repr(trained)), (folders, arm.folder.lower())):
                if value in known:
                    same = "is the same as" if known is seen else "would have the folder of"
                    raise UserError(f"arm {arm.name} {same} arm {known[value]}")
                known[value] = arm.name


def read_study(
    names: Sequence[str],
    options: Mapping[str, Any],
    overrides: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> Study:
    """The study of recipes and YAML files, options of STUDY_KEYS and fields of a recipe.

    Each stands over the one before it, and all over the defaults of a recipe's fields. Options are
    texts as they are typed, or None.
    """
    values = dict(defaults)
    given: dict[str, Any] = {}
    for file in map(find_recipe, names):
        own = read_fields(file)
        keys = [key for key in STUDY_KEYS if key in own and (key != "lr" or _is_list(own[key]))]
        given |= {key: own.pop(key) for key in keys}
        values = merged_fields(values, own, str(file))
    for key in DECIDED:
        if key in overrides:
            raise UserError(f"compare takes no --{key}: say --arm, --variants and --seeds")
        if key != "variant":
            values.pop(key, None)  # a recipe for training has its own
    given |= {key: value for key, value in options.items() if value is not None}
    recipe = merge(make_recipe(values), overrides)
    return make_study(recipe, given)


def make_study(recipe: Recipe, given: Mapping[str, Any]) -> Study:
    """A study of a recipe and values of STUDY_KEYS, as YAML or the command line have them."""
    arms = _arms(given)
    names = [arm.name for arm in arms]
    baseline = given.get("baseline")
    if baseline is None and DEFAULT_BASELINE in names:
        baseline = DEFAULT_BASELINE
    contrasts = given.get("contrasts") or ()
    if isinstance(contrasts, str):
        contrasts = [contrasts]
    if not _is_list(contrasts):
        raise UserError(f"contrasts is {contrasts!r}; it must be a list of pairs of arms")
    return Study(
        recipe,
        arms,
        _numbers("seeds", given.get("seeds", DEFAULT_SEEDS), _whole),
        baseline,
        [_pair(value) for value in contrasts],
        _numbers("lr", given.get("lr", ()), float),
        _numbers("rate_seeds", given.get("rate_seeds", (DEFAULT_RATE_SEED,)), _whole),
        _numbers("budgets", given.get("budgets", ()), _whole),
    )


def _arms(given: Mapping[str, Any]) -> list[Arm]:
    arms, variants = given.get("arms"), given.get("variants")
    found: list[Arm] = []
    if isinstance(arms, Mapping):
        found += [arm_of(str(name), value) for name, value in arms.items()]
    elif arms is not None:
        if not _is_list(arms):
            raise UserError(f"arms is {arms!r}; it must be a list, or names with their fields")
        found += [parse_arm(str(text)) for text in arms]
    if variants is not None:
        if not isinstance(variants, str) and not _is_list(variants):
            raise UserError(f"variants is {variants!r}; it must be names of variants")
        words = variants.split(",") if isinstance(variants, str) else list(variants)
        found += [parse_arm(str(word).strip()) for word in words]
    if arms is None and variants is None:
        found = [parse_arm(name) for name in DEFAULT_ARMS]
    return found


def _pair(value: Any) -> tuple[str, str]:
    parts = value.split(" - ") if isinstance(value, str) else value
    if not _is_list(parts) or len(parts) != 2:
        raise UserError(f"the contrast {value!r} must be two arms, 'ARM - REFERENCE'")
    return str(parts[0]).strip(), str(parts[1]).strip()


def _numbers(name: str, value: Any, kind: Callable[[Any], T]) -> list[T]:
    """A list of numbers, or text with commas between them; UserError for one that is none."""
    words = value.split(",") if isinstance(value, str) else value if _is_list(value) else [value]
    try:
        if any(isinstance(word, bool) for word in words):
            raise ValueError(value)
        found = [kind(word) for word in words]
    except (TypeError, ValueError, OverflowError):
        shown = value if isinstance(value, str) else ",".join(map(str, words))
        what = "numbers like 1e-3,2e-3" if kind is float else "whole numbers like 0,1,2"
        raise UserError(f"{name} is {shown!r}; it must be {what}") from None
    if any(isinstance(number, float) and not math.isfinite(number) for number in found):
        raise UserError(f"{name} has a number that is not finite")
    return found


def _whole(value: Any) -> int:
    number = float(value)
    if number != int(number):
        raise ValueError(value)
    return int(number)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)
