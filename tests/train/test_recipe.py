"""Recipes: YAML and command-line words in, checked values out."""

import dataclasses
import shlex
from pathlib import Path

import pytest
from train.micro import user_error

from deep_delta.model.presets import SIZES, VARIANTS
from deep_delta.train import Recipe, load_recipe, make_recipe, merge, model_config, parse_overrides
from deep_delta.train.recipe import SHIPPED, find_recipe, save_recipe, shipped_recipes


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_every_field_survives_a_round_trip_through_yaml(tmp_path):
    changed = {
        "parameterization": "paper", "model": {"hidden_size": 32, "gate": "layer"},
        "micro_batch_size": 2, "mask_documents": True, "decay_residual": False,
        "precision": "bf16", "gradient_checkpointing": True, "resume": "never",
        "compile": True, "loss": "liger", "parallel": "fsdp2", "trackers": "none",
        "cuda_graphs": True, "name": "my/name", "test_data": "my test_data",
        "init": "runs/x/final",
    }  # fmt: skip
    for field in dataclasses.fields(Recipe):
        if field.name in changed:
            continue
        is_text = isinstance(field.default, str)
        changed[field.name] = f"my {field.name}" if is_text else (field.default or 4) * 0.5
        if field.type in (int, int | None):
            changed[field.name] = (field.default or 4) + 1
    recipe = Recipe(**changed)
    defaults = Recipe()
    assert all(getattr(recipe, name) != getattr(defaults, name) for name in changed)
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe


def test_a_recipe_may_be_json(tmp_path):
    path = write(tmp_path, '{"variant": "additive", "model": {"gate": "fixed"}, "lr": 0.01}')
    assert load_recipe(path) == Recipe(variant="additive", model={"gate": "fixed"}, lr=0.01)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "must hold fields"),
        ("- a\n- b\n", "must hold fields"),
        ("steps: [1\n", "not valid YAML"),
        ("stepps: 3\n", "unknown field 'stepps'; did you mean 'steps'?"),
        ("zzz: 3\n", "unknown field 'zzz'; known: variant, size"),
        ("1: 3\n", "unknown field"),
        ("steps: many\n", "steps"),
        (b"\xff\xfe\x00\x01", "recipe.yaml"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, text, expected):
    message = user_error(load_recipe, write(tmp_path, text))
    assert expected in message
    assert "recipe.yaml" in message


def test_a_missing_recipe_is_named(tmp_path):
    path = tmp_path / "no.yaml"
    assert user_error(load_recipe, path).startswith(f"there is no recipe {path}; ")


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("steps", "many", "a whole number"),
        ("steps", 1.5, "a whole number"),
        ("steps", True, "a whole number"),
        ("steps", None, "a whole number"),
        ("lr", "fast", "a number"),
        ("lr", False, "a number"),
        ("mask_documents", 1, "true or false"),
        ("variant", ["ddl-cc"], "text"),
        ("model", "small", "fields"),
        ("precision", "fp16", "auto, bf16, fp32"),
    ],
)
def test_a_wrong_type_says_what_is_wanted(name, value, kind):
    message = user_error(make_recipe, {name: value})
    assert name in message
    assert kind in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(n, 0) for n in ("steps", "batch_size", "micro_batch_size", "lr", "log_every")],
        *[(n, -1) for n in ("eval_every", "eval_sequences", "save_every", "keep_checkpoints")],
        *[(n, -1) for n in ("warmup_steps", "weight_decay", "min_lr_ratio")],
        ("seq_len", 1),
        ("min_lr_ratio", 1.5),
        ("seed", -1),
        ("seed", 2**32),
        ("lr", float("nan")),
    ],
)
def test_values_that_cannot_be_are_refused(name, value):
    assert name in user_error(make_recipe, {name: value})


def test_options_are_parsed():
    text = (
        "--steps 5 --lr=1e-3 --mask-documents true --micro_batch_size null --out=a=b "
        "--model.hidden_size 16 --model.rope-x=y --eval_every 3 --weight_decay -1"
    )
    overrides = parse_overrides(shlex.split(text))
    model = overrides.pop("model")
    assert model == {"hidden_size": 16, "rope_x": "y"}
    assert overrides.pop("weight_decay") == -1
    recipe = make_recipe(overrides)
    assert (recipe.steps, recipe.lr, recipe.eval_every) == (5, 0.001, 3)
    assert (recipe.mask_documents, recipe.micro_batch_size, recipe.out) == (True, None, "a=b")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("steps 5", "'steps'"),
        ("--steps", "--steps needs a value"),
        ("--steps --lr 1", "--steps needs a value"),
        ("--steps 5 6", "'6'"),
    ],
)
def test_words_without_a_field_or_a_value_are_refused(text, named):
    assert named in user_error(parse_overrides, text.split())


@pytest.mark.parametrize(
    "text", ["@runs", "[a", "a: b", "2024-01-31", "1.10", "010", "1_000", "no", "#1"]
)
def test_text_fields_keep_what_was_typed(text):
    assert merge(Recipe(), parse_overrides(["--out", text])).out == text


@pytest.mark.parametrize(
    "words", [["--model", "small"], ["--model", "small", "--model.hidden_size", "16"]]
)
def test_the_model_field_takes_no_single_value(words):
    assert "model" in user_error(lambda: merge(Recipe(), parse_overrides(words)))


def test_merge_replaces_fields_and_merges_the_model():
    recipe = Recipe(steps=7, model={"hidden_size": 32, "head_dim": 8})
    merged = merge(recipe, {"lr": 1, "model": {"head_dim": 16}})
    assert merged == Recipe(steps=7, lr=1.0, model={"hidden_size": 32, "head_dim": 16})
    assert recipe.model == {"hidden_size": 32, "head_dim": 8}
    assert "'stepps'; did you mean 'steps'" in user_error(merge, recipe, {"stepps": 3})


def test_differences_name_what_would_train_another_model():
    recipe = Recipe(steps=7)
    free = {"out": "b", "resume": "never", "log_every": 1, "eval_every": 1, "save_every": 1}
    free |= {"trackers": "none", "micro_batch_size": 2, "gradient_checkpointing": True}
    free |= {"cuda_graphs": True, "name": "c", "test_data": "d", "model": {"rebuild": 1}}
    assert dataclasses.replace(recipe, **free, keep_checkpoints=5).differences(recipe) == []
    other = dataclasses.replace(recipe, steps=8, model={"gate": "layer"})
    assert other.differences(recipe) == ["model: {} -> {'gate': 'layer'}", "steps: 7 -> 8"]
    faster = dataclasses.replace(recipe, compile=True, loss="liger")  # which rounds otherwise
    assert faster.differences(recipe) == ["compile: False -> True", "loss: torch -> liger"]


def test_the_run_folder_is_named_after_name_or_variant_and_seed():
    folder = Recipe(out="a/b", variant="ddl-tc", seed=3).run_folder
    assert folder.parts == ("a", "b", "ddl-tc", "seed-3")
    folder = Recipe(out="a/b", variant="ddl-tc", name="one gate/lr-0.1", seed=3).run_folder
    assert folder.parts == ("a", "b", "one gate", "lr-0.1", "seed-3")


@pytest.mark.parametrize("name", ["", "/a", "a//b", "../a", "a/../b", "a/", ".a", "a\\b"])
def test_a_name_stays_below_out(name):
    assert "name of a folder below OUT" in user_error(lambda: Recipe(name=name))


def of_variant(variant, *names):
    return merge(load_recipe(*names), {"variant": variant})


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_shipped_recipes_train_every_variant(size, variant):
    recipe = of_variant(variant, size)
    assert (recipe.variant, recipe.size) == (variant, size)
    assert recipe.differences(load_recipe(size)) in ([], [f"variant: ddl-cc -> {variant}"])
    config = model_config(recipe)
    assert config.num_hidden_layers == SIZES[size]["num_hidden_layers"]
    assert {name: getattr(config, name) for name in VARIANTS[variant]} == VARIANTS[variant]


def test_the_tiny_recipe_is_the_demos_for_longer():
    changed = {"steps", "eval_every", "save_every", "out"}
    tiny, demo = (dataclasses.asdict(recipe) for recipe in (load_recipe("tiny"), Recipe()))
    assert {name for name in tiny if tiny[name] != demo[name]} == changed
    assert (tiny["steps"], tiny["save_every"]) == (200, 100)


@pytest.mark.parametrize(("size", "micro_batch_size"), [("small", 30), ("medium", 15)])
def test_large_recipes_are_the_papers(size, micro_batch_size):
    recipe = load_recipe(size)
    assert recipe.steps * recipe.batch_size * recipe.seq_len == 100_000 * 480 * 1024
    assert (recipe.lr, recipe.warmup_steps, recipe.weight_decay) == (1e-3, 2000, 0.1)
    assert (recipe.beta1, recipe.beta2, recipe.clip) == (0.9, 0.95, 1.0)
    assert (recipe.precision, recipe.seed) == ("bf16", 0)
    assert (recipe.data, recipe.parameterization) == ("data/fineweb-edu", "published")
    assert recipe.micro_batch_size == micro_batch_size
    for devices in (1, 2, 4, 8):
        assert recipe.batch_size % (micro_batch_size * devices) == 0


@pytest.mark.parametrize(("name", "tokens"), [("1b", 1e9), ("5b", 5e9)])
def test_budgets_are_whole_schedules_of_so_many_tokens(name, tokens):
    short = load_recipe("small", f"budgets/{name}")
    assert short.steps * short.batch_size * short.seq_len == pytest.approx(tokens, rel=1e-3)
    changed = [difference.split(":")[0] for difference in short.differences(load_recipe("small"))]
    assert changed == ["steps", "warmup_steps"]


def test_the_160m_budget_is_one_of_minutes():
    short = load_recipe("small", "budgets/160m")
    assert short.steps * short.batch_size * short.seq_len == pytest.approx(157e6, rel=3e-3)
    assert short.micro_batch_size == short.batch_size, "one pass a step"


def test_the_launch_fields_change_nothing_that_is_learned():
    sharded = load_recipe("medium", "launch/fsdp2")
    assert sharded.parallel == "fsdp2"
    assert sharded.differences(load_recipe("medium")) == []


def test_names_are_looked_up_among_the_shipped_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe("small") == SHIPPED / "small.yaml"
    assert find_recipe(Path("budgets/1b")) == SHIPPED / "budgets" / "1b.yaml"
    assert set(shipped_recipes()) == {
        *SIZES, "budgets/160m", "budgets/1b", "budgets/5b", "launch/fsdp2",
    }  # fmt: skip


def test_a_file_wins_over_a_shipped_recipe_and_a_folder_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    (tmp_path / "small.yaml").write_text("steps: 3\n")
    assert find_recipe("small") == SHIPPED / "small.yaml", "the folder and small.yaml are not meant"
    for name in ("small.yaml", "./small.yaml"):
        assert load_recipe(name) == Recipe(steps=3)
    (tmp_path / "tiny").write_text("steps: 4\n")
    assert load_recipe("tiny") == Recipe(steps=4)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("smal", "did you mean 'small'?"),
        ("small.yaml", "did you mean 'small'?"),
        ("budget/1b", "did you mean 'budgets/1b'?"),
        ("1b", "known: budgets/160m, budgets/1b, budgets/5b, launch/fsdp2, medium, small, tiny"),
        ("./small", "small"),  # a path, and no name
        ("../recipes/small", "small"),
        ("launch/slurm.sh", "launch/fsdp2"),
        ("launch", "launch/fsdp2"),
        ("", "tiny"),
    ],
)
def test_a_name_that_nothing_has_gets_a_hint(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    message = user_error(load_recipe, "tiny", name)
    assert message.startswith(f"there is no recipe {name};")
    assert said in message


def test_later_files_replace_fields_of_earlier_ones(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("steps: 7\nlr: 0.5\nmodel: {head_dim: 8, rebuild: 1}\n")
    second.write_text("steps: 9\nmodel: {rebuild: 2}\n")
    recipe = load_recipe(first, second)
    assert (recipe.steps, recipe.lr, recipe.model) == (9, 0.5, {"head_dim": 8, "rebuild": 2})
    second.write_text("stepz: 9\n")
    message = user_error(load_recipe, first, second)
    assert str(second) in message
    assert "steps" in message
