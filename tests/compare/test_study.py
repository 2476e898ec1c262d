"""What a comparison may ask, in words and in YAML, and what it refuses before anything trains."""

import dataclasses

import pytest
from train.micro import micro_recipe, user_error

from deep_delta.compare import Arm, make_study, parse_arm, read_study
from deep_delta.errors import UserError
from deep_delta_cli import COMPARE_DEFAULTS, main


@pytest.mark.parametrize(
    ("text", "name", "fields"),
    [
        ("ddl-cc", "ddl-cc", {"variant": "ddl-cc"}),
        (
            "one-gate-a-layer = ddl-cc gate=layer",
            "one-gate-a-layer",
            {"variant": "ddl-cc", "model.gate": "layer"},
        ),
        ("d_v=2 = ddl-cc value_channels=2", "d_v=2",
         {"variant": "ddl-cc", "model.value_channels": 2}),
        ("slow = additive lr=1e-3 beta2=0.99", "slow",
         {"variant": "additive", "lr": 0.001, "beta2": 0.99}),
        ("model.erase=false", "model.erase=false", {"model.erase": False}),
        ("a = weight-decay=0", "a", {"weight_decay": 0}),
    ],
)  # fmt: skip
def test_an_arm_is_a_name_and_what_differs(text, name, fields):
    assert parse_arm(text) == Arm(name, fields)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "says nothing"),
        (" = ddl-cc", "says nothing"),
        ("a = ", "says nothing"),
        ("a = ddl-cc gat=layer", "did you mean 'gate'?"),
        ("a = ddl-cc layer", "'layer' is neither the variant nor field=value"),
        ("a = ddl-cc seed=3", "seed is the same for all arms"),
        ("a = ddl-cc out=x", "out is the same for all arms"),
        ("a = ddl-cc gate=layer model.gate=token", "model.gate is given twice"),
        ("a = ddl-cc 'x", "cannot be read"),
        ("a = ddl-cc transformers_version=1", "neither a recipe nor a model has the field"),
    ],
)
def test_what_is_no_arm_is_one_line(text, said):
    assert said in user_error(parse_arm, text)


def study(**given):
    return make_study(micro_recipe("nowhere", "out"), given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"arms": ["additive", "additive"]}, "arms has repeats: additive, additive"),
        ({"arms": ["additive", "other = additive"]}, "arm other is the same as arm additive"),
        ({"arms": ["ddl-cc", "b = ddl-cc gate=token"]}, "arm b is the same as arm ddl-cc"),
        ({"arms": ["a b = additive", "a_b = ddl-cc"]}, "arm a_b would have the folder of arm a b"),
        ({"arms": ["additive", "dll-cc"]}, "did you mean 'ddl-cc'"),
        ({"arms": ["a = ddl-cc gate=nosuch"]}, "gate"),
        ({"arms": ["a = ddl-cc lr=fast"]}, "arm a: lr is 'fast'; it must be a number"),
        ({"arms": ["a = ddl-cc lr=-1"]}, "lr is -1"),
        ({"arms": []}, "at least one arm"),
        ({"arms": ["a = ddl-cc gate=3"]}, "arm a: "),
        ({"arms": ["a = ddl-cc micro_batch_size=3"]}, "arm a: batch_size 4 is not a multiple"),
        ({"arms": ["summary.json = ddl-cc"]}, "the place of a file of the comparison"),
        ({"arms": ["data = ddl-cc"]}, "the place of a file of the comparison"),
        ({"arms": ["x" * 300 + " = ddl-cc"]}, "is too long: 200 bytes at most"),
        ({"arms": {"": "ddl-cc"}}, "has no name"),
        ({"arms": {"a": {"gate": "layer", "model": {"gate": "token"}}}}, "arm a: a field is given"),
        ({"variants": 5}, "variants is 5"),
        ({"contrasts": 5}, "contrasts is 5"),
        ({"lr": [True, 1e-3]}, "it must be numbers"),
        ({"lr": "1e-3,1.0000001e-3"}, "lr has repeats"),
        ({"arms": {"a": 3}}, "arm a is 3; it must be a variant"),
        ({"arms": "additive"}, "it must be a list, or names with their fields"),
        ({"variants": ""}, "says nothing"),
        ({"seeds": ""}, "seeds is ''; it must be whole numbers like 0,1,2"),
        ({"seeds": "0,x"}, "seeds is '0,x'"),
        ({"seeds": "0,0"}, "seeds has repeats"),
        ({"seeds": "0,1.5"}, "whole numbers"),
        ({"seeds": "0,-1"}, "seed is -1"),
        ({"lr": "1e-3,fast"}, "lr is '1e-3,fast'; it must be numbers like 1e-3,2e-3"),
        ({"lr": "1e-3,"}, "it must be numbers"),
        ({"lr": "1e-3,0"}, "lr is 0"),
        ({"lr": "1e-3,1e-3"}, "lr has repeats"),
        ({"lr": "1e-3,nan"}, "not finite"),
        ({"lr": "1e-3,2e-3", "seeds": "0,1000"}, "seed 1000 is reported"),
        ({"baseline": "additve"}, "there is no arm 'additve'; there are additive, "),
        ({"contrasts": ["ddl-cc - nosuch"]}, "there is no arm 'nosuch'"),
        ({"contrasts": ["ddl-cc"]}, "must be two arms"),
        ({"contrasts": ["ddl-cc - ddl-cc"]}, "cannot be compared with itself"),
        ({"arms": ["ddl-cc"], "budgets": "1e6"}, "name one by --baseline"),
        ({"budgets": "1e6,many"}, "budgets is '1e6,many'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_line_before_anything_trains(given, said):
    assert said in user_error(lambda: study(**given))


def test_budgets_longer_than_the_data_are_refused(micro_data, tmp_path):
    recipe = micro_recipe(micro_data, tmp_path)
    for arm, budget, said in (
        ("additive", "1e9", "longer than the data, which has 1,510"),
        ("additive", "10", "than a step"),
        ("additive = additive batch_size=8", "64,256", "than a step of 128"),
        ("additive", "128,129", "the same number of steps"),
    ):
        asked = make_study(recipe, {"arms": [arm, "ddl-cc"], "budgets": budget})
        assert said in user_error(asked.check_budgets)


def test_contrasts_are_with_the_baseline_unless_declared():
    assert study(arms=["additive", "ddl-cc", "ddl-tc"]).pairs == [
        ("ddl-cc", "additive"), ("ddl-tc", "additive"),
    ]  # fmt: skip
    assert study(arms=["ddl-cc", "ddl-tc"]).pairs == []
    assert study(arms=["additive", "ddl-cc"], contrasts=None).pairs == [("ddl-cc", "additive")]
    declared = study(arms=["additive", "ddl-cc"], contrasts="additive - ddl-cc")
    assert declared.pairs == [("additive", "ddl-cc")]
    assert study(arms=["ddl-cc", "ddl-tc"], baseline="ddl-tc").pairs == [("ddl-cc", "ddl-tc")]
    given = {"arms": ["additive", "ddl-cc", "x - y = ddl-tc"], "contrasts": [["ddl-cc", "x - y"]]}
    assert study(**given).pairs == [("ddl-cc", "x - y")]


def test_a_yaml_file_says_what_the_command_line_does(tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(
        "steps: 7\nmodel: {hidden_size: 16, num_attention_heads: 1, head_dim: 16}\n"
        "arms:\n  additive:\n  one gate: ddl-cc gate=layer\n"
        "  two: {variant: ddl-cc, model: {value_channels: 2}, beta2: 0.99}\n"
        "contrasts: [[one gate, two], two - additive]\n"
        "lr: [1e-3, 2.0e-3]\nrate_seeds: [7]\nseeds: [0, 1]\nbudgets: [1.0e6]\n"
    )
    words = [
        "--arm", "additive", "--arm", "one gate = ddl-cc gate=layer",
        "--arm", "two = ddl-cc value_channels=2 beta2=0.99",
    ]  # fmt: skip
    by_file = read_study(["tiny", str(file)], {}, {"batch_size": 4}, COMPARE_DEFAULTS)
    typed = {
        "arms": words[1::2], "contrasts": ["one gate - two", "two - additive"], "lr": "1e-3,2e-3",
        "rate_seeds": "7", "seeds": "0,1", "budgets": "1e6",
    }  # fmt: skip
    fields = {"batch_size": 4, "steps": 7, "model": {"hidden_size": 16, "num_attention_heads": 1,
                                                     "head_dim": 16}}  # fmt: skip
    assert read_study(["tiny"], typed, fields, COMPARE_DEFAULTS) == by_file
    assert by_file.rates == [0.001, 0.002]
    assert by_file.recipe.batch_size == 4
    assert by_file.recipe.out == "runs/tiny"


def test_a_fields_default_is_the_comparisons_own():
    asked = read_study([], {}, {}, COMPARE_DEFAULTS)
    assert (asked.recipe.out, asked.recipe.trackers) == ("runs/compare", "none")
    assert [arm.name for arm in asked.arms] == [
        "additive", "additive-expanded", "write-only-cc", "ddl-cc", "ddl-scalar",
    ]  # fmt: skip
    assert asked.baseline == "additive"
    assert not asked.searches


@pytest.mark.parametrize("name", ["variant", "seed", "resume", "name", "init"])
def test_what_a_comparison_decides_is_no_option(name):
    with pytest.raises(UserError, match=f"compare takes no --{name}"):
        read_study([], {}, {name: "1"}, COMPARE_DEFAULTS)


def test_one_rate_is_no_choice():
    asked = study(arms=["additive", "b = ddl-cc lr=0.5"], lr="0.25")
    assert not asked.searches
    assert [asked.recipe_of(arm).lr for arm in asked.arms] == [0.25, 0.5]


def test_an_arm_changes_its_recipe_alone():
    asked = study(arms=["additive", "a = ddl-cc gate=layer beta2=0.9"])
    base, recipe = (asked.recipe_of(arm) for arm in asked.arms)
    assert recipe.model == {**asked.recipe.model, "gate": "layer"}
    assert (recipe.beta2, recipe.variant, recipe.name) == (0.9, "ddl-cc", "a")
    one, other = dataclasses.asdict(base), dataclasses.asdict(recipe)
    changed = {name for name, value in one.items() if value != other[name]}
    assert changed == {"beta2", "variant", "name", "model"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--arm", "additive", "--arm", "a = ddl-cc gat=layer"], "did you mean 'gate'?"),
        (["--arm", "additive", "--seeds", "0,x"], "seeds is '0,x'"),
        (["nosuch"], "there is no recipe nosuch"),
        (["--arms", "additive"], "unknown option --arms; did you mean 'arm'?"),
        (["tiny", "--variants", "additive", "--lr", ""], "lr is ''"),
    ],
)
def test_the_command_says_it_in_one_line(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *words]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert not list(tmp_path.iterdir())
