"""Arms of a comparison: a name, and the fields in which its recipe differs from the others'."""

import dataclasses
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deep_delta.errors import UserError
from deep_delta.model import DeepDeltaConfig
from deep_delta.train.recipe import Recipe, merge, nearest, parse_field

# What a comparison decides itself, or what must be the same for all arms.
SHARED = {
    "out", "name", "seed", "resume", "init", "data", "test_data", "eval_sequences", "seq_len",
    "trackers", "model",
}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """fields: what differs, flat: fields of a recipe, and model.FIELD for those of the model."""

    name: str
    fields: Mapping[str, Any]

    @property
    def folder(self) -> str:
        """The arm's folder in the comparison's: its name, with odd characters replaced."""
        return re.sub(r"[^\w.=+-]", "_", self.name).lstrip(".") or "_"

    def recipe(self, base: Recipe) -> Recipe:
        """The base recipe with the arm's fields; UserError for values that do not fit."""
        own = {name: value for name, value in self.fields.items() if not name.startswith("model.")}
        model = {
            name.removeprefix("model."): value
            for name, value in self.fields.items()
            if name.startswith("model.")
        }
        return merge(base, {**own, "model": model}, origin=f"arm {self.name}")


def parse_arm(text: str) -> Arm:
    """An arm as it is typed: "VARIANT", or "NAME = VARIANT field=value ...".

    Without a name it is called what is typed. A field is one of a recipe or, where no recipe has
    it, of the model's configuration. UserError in one line for anything else.
    """
    name, equals, spec = text.partition(" = ")
    if not equals:
        name, spec = text, text
    name = name.strip()
    try:
        words = shlex.split(spec)
    except ValueError as error:
        raise UserError(f"the arm {text!r} cannot be read: {error}") from None
    if not name or not words:
        raise UserError(f"the arm {text!r} says nothing: give 'VARIANT' or 'NAME = VARIANT f=v'")
    fields: dict[str, Any] = {}
    for place, word in enumerate(words):
        field, given, value = word.partition("=")
        if not given and place == 0:
            fields["variant"] = word
        elif not given:
            raise UserError(f"arm {name}: {word!r} is neither the variant nor field=value")
        else:
            key = field_of(name, field)
            if key in fields:
                raise UserError(f"arm {name}: {key} is given twice")
            fields[key] = parse_field(key, value)
    return Arm(name, fields)


def arm_of(name: str, value: Any) -> Arm:
    """An arm of a YAML file: its name, and text as `parse_arm` reads it or a mapping of fields."""
    if not name.strip():
        raise UserError(f"an arm of {value!r} has no name")
    if value is None:
        return parse_arm(name)
    if isinstance(value, str):
        return dataclasses.replace(parse_arm(value), name=name)
    if not isinstance(value, dict):
        raise UserError(f"arm {name} is {value!r}; it must be a variant, 'VARIANT f=v' or fields")
    model = value.get("model")
    inner = model if isinstance(model, dict) else {}
    fields = {
        **{str(field): own for field, own in value.items() if own is not inner},
        **{f"model.{field}": own for field, own in inner.items()},
    }
    flat = {field_of(name, field): own for field, own in fields.items()}
    if len(flat) != len(fields):
        raise UserError(f"arm {name}: a field is given twice")
    return Arm(name, flat)


def field_of(arm: str, field: str) -> str:
    """The full name of a field that an arm sets; UserError for one that does not exist or fit."""
    known = [f.name for f in dataclasses.fields(Recipe)]
    own = list(DeepDeltaConfig.__annotations__)  # without those of every transformers model
    word = field.replace("-", "_")
    if word in known:
        if word in SHARED:
            raise UserError(f"arm {arm}: {word} is the same for all arms of a comparison")
        return word
    if word.removeprefix("model.") in own:
        return f"model.{word.removeprefix('model.')}"
    hint = nearest(word.removeprefix("model."), [*known, *own])
    raise UserError(f"arm {arm}: neither a recipe nor a model has the field {field!r}{hint}")
