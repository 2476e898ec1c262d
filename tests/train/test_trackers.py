"""Trackers get the rows of metrics.jsonl, each step once, and cannot harm a run.

W&B and Trackio are stood in for by the few calls that are used of them, so that they are tested
where they are not installed; where they are, the real ones are tested too.
"""

import sys
from types import SimpleNamespace

import pytest
from train.micro import losses, micro_recipe, rows_of, user_error

from deep_delta.train import Recipe, read_metrics, train


def crash():
    raise RuntimeError("the machine is gone")


@pytest.fixture
def interrupted(micro_data, tmp_path, at_pass):
    """Run six steps that end in the sixth, after a checkpoint at the fourth; the recipe."""

    def run(trackers):
        recipe = micro_recipe(micro_data, tmp_path, save_every=4, trackers=trackers)
        at_pass(6, crash)
        with pytest.raises(RuntimeError, match="gone"):
            train(recipe)
        return recipe

    return run


def numbers(row):
    return {name: value for name, value in row.items() if name != "step"}


def check_events(folder):
    """TensorBoard shows the numbers of metrics.jsonl (as float32), each at its step and once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    shown = [
        ((name, event.step), event.value)
        for name in events.Tags()["scalars"]
        for event in events.Scalars(name)
    ]
    expected = {
        (name, row["step"]): value
        for row in read_metrics(folder / "metrics.jsonl")
        for name, value in numbers(row).items()
    }
    assert len(shown) == len(expected) > 0
    assert dict(shown) == pytest.approx(expected, rel=1e-6)


def test_tensorboard_has_the_rows(micro_data, tmp_path, at_pass):
    recipe = micro_recipe(micro_data, tmp_path, log_every=2)
    at_pass(4, lambda: check_events(recipe.run_folder))  # as soon as they are written
    train(recipe)
    check_events(recipe.run_folder)
    without = micro_recipe(micro_data, tmp_path / "without", log_every=2, trackers="none")
    train(without)
    assert not (without.run_folder / "tensorboard").exists()
    assert losses(recipe.run_folder) == losses(without.run_folder)


def test_tensorboard_goes_on_where_the_run_does(interrupted):
    recipe = interrupted("tensorboard")
    check_events(recipe.run_folder)
    assert rows_of(recipe.run_folder, "loss")[-1]["step"] == 5, "it will be trained again"
    train(recipe)
    assert rows_of(recipe.run_folder, "loss")[-1]["step"] == 6
    check_events(recipe.run_folder)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("none", []),
        ("wandb", ["wandb"]),
        ("trackio, tensorboard,trackio", ["trackio", "tensorboard"]),
    ],
)
def test_trackers_are_names_with_commas(text, names):
    assert Recipe(trackers=text).tracker_names == names


@pytest.mark.parametrize("text", ["tensorbord", "", "none,wandb", "wandb,"])
def test_an_unknown_tracker_is_one_line(text):
    message = user_error(lambda: Recipe(trackers=text))
    assert repr(text) in message
    assert "tensorboard, wandb, trackio" in message


@pytest.mark.parametrize(
    ("name", "extra"), [("tensorboard", "train"), ("wandb", "wandb"), ("trackio", "trackio")]
)
def test_a_missing_tracker_is_one_line_before_anything_else(
    micro_data, tmp_path, monkeypatch, name, extra
):
    monkeypatch.setitem(sys.modules, name, None)
    recipe = micro_recipe(micro_data, tmp_path, trackers=name)
    message = user_error(train, recipe)
    assert f"{name} is not installed: pip install 'deep-delta-learning[{extra}]'" in message
    assert not recipe.run_folder.exists()


class Run:
    """The run of a tracker: what began it, what it was told, and how it ended."""

    def __init__(self, **began):
        self.began, self.rows, self.exits = began, [], []

    def log(self, numbers, step):
        self.rows.append((step, numbers))

    def finish(self, exit_code=None):
        self.exits.append(exit_code)


@pytest.fixture
def wandb_runs(monkeypatch):
    """Those that a stand-in for wandb began."""
    runs = []

    def init(**began):
        runs.append(Run(**began))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return runs


def test_wandb_goes_on_with_the_same_run(interrupted, wandb_runs):
    recipe = interrupted("wandb")
    first = read_metrics(recipe.run_folder / "metrics.jsonl")
    train(recipe)
    again = [row for row in read_metrics(recipe.run_folder / "metrics.jsonl") if row["step"] > 4]
    before, after = wandb_runs
    assert before.began == after.began
    began = before.began
    assert (began["name"], began["resume"]) == ("ddl-cc-seed-0", "allow")
    assert began["id"].startswith("ddl-cc-seed-0-")
    assert (began["config"]["lr"], began["config"]["model"]["value_channels"]) == (3e-3, 4)
    assert before.rows == [(row["step"], numbers(row)) for row in first]
    assert after.rows == [(row["step"], numbers(row)) for row in again]
    assert (before.exits, after.exits) == ([1], [0])


def test_a_run_from_the_first_step_is_another_one(micro_data, tmp_path, at_pass, wandb_runs):
    recipe = micro_recipe(micro_data, tmp_path, trackers="wandb")
    at_pass(3, crash)  # without a checkpoint
    with pytest.raises(RuntimeError, match="gone"):
        train(recipe)
    train(recipe)
    first, second = wandb_runs
    assert first.began["id"] != second.began["id"]


def test_a_tracker_that_fails_stops_nothing(micro_data, tmp_path, wandb_runs, monkeypatch, capsys):
    log = Run.log

    def failing(self, numbers, step):
        if step == 3:
            raise ConnectionError("the network\nis gone")
        log(self, numbers, step)

    monkeypatch.setattr(Run, "log", failing)
    recipe = micro_recipe(micro_data, tmp_path, trackers="wandb,tensorboard")
    train(recipe)
    assert [step for step, _ in wandb_runs[0].rows] == [1, 2]
    lines = [line for line in capsys.readouterr().err.splitlines() if "wandb" in line]
    assert lines == ["ddl: wandb gets no more rows, metrics.jsonl does: the network is gone"]
    assert [row["step"] for row in rows_of(recipe.run_folder, "loss")] == [1, 2, 3, 4, 5, 6]
    check_events(recipe.run_folder)


def test_a_tracker_that_cannot_end_harms_no_result(
    micro_data, tmp_path, wandb_runs, monkeypatch, capsys
):
    def failing(self, exit_code):
        raise ConnectionError("the network is gone")

    monkeypatch.setattr(Run, "finish", failing)
    recipe = micro_recipe(micro_data, tmp_path, trackers="wandb")
    assert train(recipe).tokens == 6 * 4 * 16
    assert "ddl: wandb did not end well: the network is gone" in capsys.readouterr().err


def test_a_tracker_that_does_not_start_is_one_line(micro_data, tmp_path, monkeypatch):
    def init(**began):
        raise RuntimeError("No API key\nconfigured")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    recipe = micro_recipe(micro_data, tmp_path, trackers="wandb")
    message = user_error(train, recipe)
    assert "wandb does not start: No API key configured" in message
    assert not rows_of(recipe.run_folder, "step"), "nothing was trained"


@pytest.fixture(params=["stand-in", "real"])
def trackio_rows(request, tmp_path, monkeypatch):
    """Call it for every run that Trackio has: its name and its rows, as (step, numbers)."""
    if request.param == "real":
        monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
        pytest.importorskip("trackio", reason="Trackio is not installed")
        from trackio.sqlite_storage import SQLiteStorage

        def rows(project, run_id):
            for log in SQLiteStorage.get_logs(project, run_id=run_id):
                del log["timestamp"]
                yield log.pop("step"), log

        return lambda: [
            (run["name"], list(rows("deep-delta", run["id"])))
            for run in SQLiteStorage.get_run_records("deep-delta")
        ]

    runs = []

    class OldRun(SimpleNamespace):
        def delete(self):
            runs.remove(self.run)

    class Api:
        def runs(self, project):
            if not runs:
                raise ValueError(f"Project {project!r} does not exist")
            return [OldRun(name=run.began["name"], run=run) for run in runs]

    def init(project, **began):
        runs.append(Run(**began))
        return runs[-1]

    fake = SimpleNamespace(Api=Api, init=init, finish=lambda: runs[-1].finish())
    monkeypatch.setitem(sys.modules, "trackio", fake)
    return lambda: [(run.began["name"], run.rows) for run in runs]


def test_trackio_has_each_row_once(interrupted, trackio_rows):
    recipe = interrupted("trackio")
    for _ in range(2):
        ((name, shown),) = trackio_rows()
        assert name.startswith("ddl-cc-seed-0-")
        rows = read_metrics(recipe.run_folder / "metrics.jsonl")
        assert shown == [(row["step"], numbers(row)) for row in rows]
        train(recipe)


def test_real_wandb_goes_on_with_the_same_run(interrupted, monkeypatch):
    pytest.importorskip("wandb", reason="W&B is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    recipe = interrupted("wandb")
    train(recipe)
    known_by = (recipe.run_folder / "wandb.id").read_text().strip()
    parts = list((recipe.run_folder / "wandb").glob("offline-run-*"))
    assert len(parts) == 2
    assert all((part / f"run-{known_by}.wandb").is_file() for part in parts)
