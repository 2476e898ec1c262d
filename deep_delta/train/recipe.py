"""A recipe: every choice of a training run, as one documented dataclass and one YAML file."""

import contextlib
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from deep_delta.data.files import write_atomically
from deep_delta.errors import UserError

# Changing these does not change what the run learns, so a resumed run may differ in them.
# Data counts by its hashes, not by its path: see `folder.prepare_folder`.
_FREE_TO_CHANGE = {
    "out", "name", "resume", "data", "test_data", "log_every", "eval_every", "save_every",
    "keep_checkpoints", "trackers",
    # These add in another order, as another number of processes does.
    "parallel", "micro_batch_size", "gradient_checkpointing", "cuda_graphs",
}  # fmt: skip
REORDERS_SUMS = {"rebuild", "backend"}  # fields of the model's configuration, likewise
NAME = r"[^/\\.][^/\\]*(/[^/\\.][^/\\]*)*"  # of a folder, and of folders in it; none is hidden
MOST_BYTES = 200  # of a folder's name; file systems take 255, and a lock file's is a little longer
TRACKERS = ("tensorboard", "wandb", "trackio")
SHIPPED = Path(str(files("deep_delta") / "recipes"))  # has launch/slurm.sh too


@dataclass
class Recipe:
    """How to train one model. The defaults are the demo's: a tiny model on the bundled text."""

    variant: str = field(default="ddl-cc", metadata={"help": "residual variant, e.g. additive"})
    size: str = field(default="tiny", metadata={"help": "tiny, small or medium"})
    # The paper's text has a linear target, the authors' published code a positive one. At the
    # demo's size the second learns faster: see "Which target?" in the README.
    parameterization: Literal["paper", "published"] = field(
        default="published", metadata={"help": "choices of the published code, or the paper's text"}
    )
    model: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "fields of DeepDeltaConfig to set on top"}
    )
    data: str = field(
        default="bundled",
        metadata={"help": "folder made by ddl prepare, or 'bundled' for the package's own text"},
    )
    test_data: str | None = field(
        default=None,
        metadata={"help": "folder whose text is looked at once, at the end; default: data's test"},
    )
    out: str = field(default="runs/train", metadata={"help": "the run goes to OUT/NAME/seed-SEED"})
    name: str | None = field(
        default=None, metadata={"help": "what the run is called; default: its variant"}
    )
    seed: int = field(default=0, metadata={"help": "initial weights and data order"})
    steps: int = field(default=80, metadata={"help": "optimizer steps"})
    batch_size: int = field(default=8, metadata={"help": "sequences per optimizer step, in all"})
    micro_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "sequences per forward pass and device; default: as few passes as can be"
        },
    )
    seq_len: int = field(default=128, metadata={"help": "tokens per sequence"})
    mask_documents: bool = field(
        default=False,
        metadata={"help": "do not attend, convolve or predict across documents of a sequence"},
    )
    lr: float = field(default=6e-3, metadata={"help": "peak learning rate"})
    min_lr_ratio: float = field(default=0.1, metadata={"help": "final learning rate / lr"})
    warmup_steps: int = field(default=20, metadata={"help": "steps of linear warm-up"})
    weight_decay: float = field(
        default=0.1, metadata={"help": "on tensors of two or more dimensions"}
    )
    decay_residual: bool = field(
        default=True, metadata={"help": "false: no weight decay on gate, value, compressor and EC"}
    )
    beta1: float = field(default=0.9, metadata={"help": "AdamW's first momentum"})
    beta2: float = field(default=0.95, metadata={"help": "AdamW's second momentum"})
    clip: float = field(default=1.0, metadata={"help": "gradient norm limit"})
    precision: Literal["auto", "bf16", "fp32"] = field(
        default="auto", metadata={"help": "bf16 autocast where the device has it, or as named"}
    )
    parallel: Literal["ddp", "fsdp2"] = field(
        default="ddp", metadata={"help": "with torchrun: a whole model in each process, or shards"}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "recompute blocks in the backward pass to save memory"}
    )
    compile: bool = field(
        default=False, metadata={"help": "torch.compile layers and loss: a slow start, fast steps"}
    )
    cuda_graphs: bool = field(
        default=False,
        metadata={"help": "replay each pass as a CUDA graph: one process, where launching limits"},
    )
    loss: Literal["torch", "liger"] = field(
        default="torch", metadata={"help": "cross-entropy by torch, or by liger-kernel (GPU only)"}
    )
    log_every: int = field(default=10, metadata={"help": "steps between rows of metrics.jsonl"})
    trackers: str = field(
        default="tensorboard",
        metadata={"help": "rows also go to: tensorboard, wandb, trackio (comma-separated) or none"},
    )
    eval_every: int = field(default=40, metadata={"help": "steps between evaluations"})
    eval_sequences: int | None = field(
        default=200, metadata={"help": "validation sequences to use; null: all"}
    )
    save_every: int | None = field(
        default=None, metadata={"help": "steps between checkpoints; default: only the final model"}
    )
    keep_checkpoints: int = field(default=2, metadata={"help": "newest checkpoints to keep"})
    init: str | None = field(
        default=None,
        metadata={
            "help": "folder of a checkpoint: its model and weights, a new optimizer and schedule"
        },
    )
    resume: str = field(
        default="auto",
        metadata={"help": "auto (newest checkpoint), never (start over), or a path to start from"},
    )

    def __post_init__(self) -> None:
        positive = (
            "steps", "batch_size", "log_every", "eval_every", "keep_checkpoints", "lr", "clip",
        )  # fmt: skip
        for name in (*positive, "micro_batch_size", "eval_sequences", "save_every"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{name} is {value}; it must be positive")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}; it must lie between 0 and 2**32 - 1")
        if self.seq_len < 2:
            raise UserError(f"seq_len is {self.seq_len}; a sequence needs at least 2 tokens")
        if self.warmup_steps < 0 or self.weight_decay < 0:
            raise UserError("warmup_steps and weight_decay must not be negative")
        for name, limit in (("min_lr_ratio", 1), ("beta1", 0.9999), ("beta2", 0.99999)):
            if not 0 <= getattr(self, name) <= limit:
                raise UserError(f"{name} is {getattr(self, name)}; it must lie in 0 to {limit}")
        if not set(self.tracker_names) <= set(TRACKERS):
            raise UserError(
                f"trackers is {self.trackers!r}; it must be some of {', '.join(TRACKERS)}, "
                "comma-separated, or none"
            )

        if self.name is not None and not re.fullmatch(NAME, self.name):
            raise UserError(f"name is {self.name!r}; it must be the name of a folder below OUT")
        if any(len(part.encode()) > MOST_BYTES for part in self.label.split("/")):
            raise UserError(f"the name {self.label[:40]}… is too long: {MOST_BYTES} bytes at most")

    @property
    def label(self) -> str:
        """What the run is called: its name, or its variant."""
        return self.name or self.variant

    @property
    def run_folder(self) -> Path:
        """OUT/NAME/seed-N."""
        return Path(self.out) / self.label / f"seed-{self.seed}"

    @property
    def tracker_names(self) -> list[str]:
        """`trackers`, each of them once; empty for "none"."""
        names = [name.strip() for name in self.trackers.split(",")]
        return [] if names == ["none"] else list(dict.fromkeys(names))

    def differences(self, other: "Recipe") -> list[str]:
        """The fields in which another recipe would train another model, as "name: old -> new"."""
        ours, theirs = (
            dataclasses.asdict(recipe)
            | {"model": {n: v for n, v in recipe.model.items() if n not in REORDERS_SUMS}}
            for recipe in (self, other)
        )
        return [
            f"{name}: {theirs[name]} -> {value}"
            for name, value in ours.items()
            if name not in _FREE_TO_CHANGE and value != theirs[name]
        ]


def shipped_recipes() -> dict[str, Path]:
    """The recipes and fields that the package carries, by name: "small", "budgets/1b"."""
    found = sorted(SHIPPED.rglob("*.yaml"))
    return {path.relative_to(SHIPPED).with_suffix("").as_posix(): path for path in found}


def find_recipe(name: str | Path) -> Path:
    """The file that a user means: `name` if it is a file, else the shipped recipe of that name.

    A folder called `small` does not hide the shipped `small`; a file of that name does. UserError
    if there is neither.
    """
    path, shipped = Path(name), shipped_recipes()
    if path.is_file():
        return path
    if str(name) not in shipped:
        raise UserError(f"there is no recipe {name}{nearest(str(name), shipped)}")
    return shipped[str(name)]


def load_recipe(name: str | Path, *more: str | Path) -> Recipe:
    """Read a YAML (or JSON) recipe, and files of fields that replace some of its own.

    Each is a path or the name of a shipped one: see `find_recipe`. UserError for one that is not
    there, bad YAML, or bad fields.
    """
    values: dict[str, Any] = {}
    for file in map(find_recipe, (name, *more)):
        values = merged_fields(values, read_fields(file), str(file))
    return make_recipe(values, origin=str(name))


def merged_fields(values: Mapping[str, Any], own: dict[str, Any], origin: str) -> dict[str, Any]:
    """Fields with those of another file put over them; `model` is merged field by field.

    UserError for what is wrong with the file's own, said of it.
    """
    make_recipe(own, origin=origin)
    if isinstance(own.get("model"), dict):
        own = {**own, "model": {**values.get("model", {}), **own["model"]}}
    return {**values, **own}


def read_fields(path: Path) -> dict[str, Any]:
    """The names and values of a YAML (or JSON) file; UserError for one that has something else."""
    import yaml

    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} must hold fields of a recipe, one 'name: value' a line")
    return {str(name): value for name, value in loaded.items()}


def make_recipe(values: dict[str, Any], origin: str = "the recipe") -> Recipe:
    """A recipe from plain values. UserError for unknown fields and wrong types, in one line."""
    known = typing.get_type_hints(Recipe)
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{origin}: unknown field {name!r}{nearest(name, known)}")
        values = {**values, name: _checked(name, value, known[name], origin)}
    return Recipe(**values)


def parse_overrides(arguments: list[str], also: tuple[str, ...] = ()) -> dict[str, Any]:
    """Turn `--field value` (and `--model.field value`) words into recipe values.

    Text fields take their word as it is; others are read as YAML scalars: numbers, true/false,
    null. Dashes in field names stand for underscores. `also` names other options of the command,
    for the hint at a misspelt one.

    Raises:
        UserError: a word without a field or without a value, or an unknown field.
    """
    known = typing.get_type_hints(Recipe)
    values: dict[str, Any] = {}
    words = iter(arguments)
    for word in words:
        if not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r}: options are given as --field value")
        option, equals, text = word[2:].partition("=")
        if not equals:
            text = next(words, "--")
            if text.startswith("--"):
                raise UserError(f"--{option} needs a value")
        name = option.replace("-", "_")
        if name.startswith("model."):
            values.setdefault("model", {})[name.removeprefix("model.")] = parse_field(name, text)
        elif name == "model":
            raise UserError("--model takes no value: set its fields by --model.FIELD value")
        elif name not in known:
            raise UserError(f"unknown option --{option}{nearest(name, [*known, *also])}")
        else:
            values[name] = parse_field(name, text)
    return values


def parse_field(name: str, text: str) -> Any:
    """The value of a typed word for a field of a recipe, or for model.FIELD.

    A field that is text takes the word as it is; another reads it as a YAML scalar, or as a number
    that YAML takes for text (1e-3). UserError for a word that is none.
    """
    import yaml

    hints = typing.get_type_hints(Recipe)
    if name in hints and _is_text(hints[name]):
        return text
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        line = f"--{name} {text!r} is not a number, true, false, null or text"
        raise UserError(line) from None
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def merge(recipe: Recipe, overrides: Mapping[str, Any], origin: str = "the command line") -> Recipe:
    """The recipe with other values; `model` is merged field by field. `origin` says whose."""
    values = {**dataclasses.asdict(recipe), **overrides}
    if isinstance(overrides.get("model"), dict):
        values["model"] = {**recipe.model, **overrides["model"]}
    return make_recipe(values, origin=origin)


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe as YAML, its fields in the order of the dataclass."""
    import yaml

    text = yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False)
    write_atomically(path, text.encode())


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """What a line about an unknown name ends with: the known one that is like it, or all."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def _type(hint: Any) -> Any:
    """The type of a field that may also be None."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next(option for option in options if option is not type(None))


def _is_text(hint: Any) -> bool:
    return _type(hint) is str or typing.get_origin(_type(hint)) is Literal


def _checked(name: str, value: Any, hint: Any, origin: str) -> Any:
    """The value, if it has the field's type. YAML reads 1e-3 as text: numbers get a second try."""
    if value is None and isinstance(hint, types.UnionType):
        return None
    wanted = _type(hint)
    if typing.get_origin(wanted) is Literal:
        choices = typing.get_args(wanted)
        if value in choices:
            return value
        raise UserError(f"{origin}: {name} is {value!r}; choose one of {', '.join(choices)}")
    base = typing.get_origin(wanted) or wanted
    if base is float and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError):
            if math.isfinite(number := float(value)):
                return number
    elif isinstance(value, base) and not (base is int and isinstance(value, bool)):
        return value
    kind = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise UserError(f"{origin}: {name} is {value!r}; it must be {kind.get(base, 'fields')}")
