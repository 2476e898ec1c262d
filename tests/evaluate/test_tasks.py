"""Scores against lm-evaluation-harness itself, on the same model and the same local files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from train.micro import user_error

from deep_delta.evaluate import TASKS, Settings, evaluate
from deep_delta.evaluate.paper import COLUMNS, SCORES
from deep_delta.evaluate.tasks import read_rows

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra eval")

STOCK = {
    "arc_easy": "arc/arc_easy.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "social_iqa": "siqa/siqa.yaml",
    "winogrande": "winogrande/default.yaml",
}


def own_task_files(folder: Path, task_data: Path) -> Path:
    """The harness's task files, changed as its guide says to read local files and nothing else."""
    from lm_eval.tasks import __file__ as tasks

    for name, stock in STOCK.items():
        source = Path(tasks).parent / stock
        lines = []
        for line in source.read_text().splitlines():
            if line.startswith("dataset_path"):
                files = {p.stem: str(p) for p in sorted((task_data / name).glob("*.jsonl"))}
                line = f"dataset_path: json\ndataset_kwargs: {json.dumps({'data_files': files})}"
            elif line.startswith(("dataset_name", "tag", "  - ai2_arc", "  - multiple_choice")):
                continue
            elif line.startswith("task:"):
                line = f"task: own_{name}"
            lines.append(line)
        (folder / f"own_{name}.yaml").write_text("\n".join(lines) + "\n")
        for helper in source.parent.glob("*.py"):
            (folder / helper.name).write_text(helper.read_text())
    return folder


@pytest.mark.slow
def test_scores_are_those_of_the_harness_command(checkpoint, task_data, tmp_path):
    tasks = own_task_files(tmp_path, task_data)
    start = "import deep_delta; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    words = (
        f"--model hf --model_args pretrained={checkpoint} --device cpu --batch_size 4 "
        f"--include_path {tasks} --tasks {','.join('own_' + name for name in STOCK)} "
        f"--num_fewshot 1 --limit 5 --output_path {tmp_path / 'theirs.json'}"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "LMEVAL_LOG_LEVEL": "ERROR"}
    subprocess.run([sys.executable, "-c", start, *words.split()], check=True, env=environment)
    (written,) = tmp_path.glob("theirs*.json")
    theirs = json.loads(written.read_text())["results"]
    settings = Settings(tasks=tuple(STOCK), shots=(1,), task_data=task_data, limit=5, batch_size=3)
    ours = {t["task"]: t for t in evaluate(checkpoint, tmp_path / "out", settings, "x")["tasks"]}
    for name in STOCK:
        for metric in ("acc", "acc_norm"):
            if f"{metric},none" not in theirs[f"own_{name}"]:
                continue
            expected = 100 * theirs[f"own_{name}"][f"{metric},none"]
            assert ours[name][metric] == pytest.approx(expected)
            error = 100 * theirs[f"own_{name}"][f"{metric}_stderr,none"]
            assert ours[name][f"{metric}_stderr"] == pytest.approx(error)


@pytest.fixture(scope="module")
def finished(checkpoint, data, task_data, tmp_path_factory):
    """(folder, summary) of everything."""
    out = tmp_path_factory.mktemp("evaluated")
    settings = Settings(data=data, task_data=task_data, context=32)
    return out, evaluate(checkpoint, out, settings, "ddl eval --test")


def test_everything_is_in_the_summary(finished, checkpoint):
    out, summary = finished
    assert json.loads((out / "results.json").read_text()) == summary
    assert [(t["task"], t["shots"]) for t in summary["tasks"]] == [
        (name, shots) for shots in (0, 1) for name in TASKS
    ]
    about = summary["checkpoint"]
    assert (about["variant"], about["size"]) == ("ddl-cc", "custom")
    assert set(about["weights_sha256"]) == {"model.safetensors"}
    assert {"torch", "lm_eval", "deep-delta-learning"} <= summary["versions"].keys()
    for task in summary["tasks"]:
        assert task["examples"] == 7
        assert 0 <= task["acc"] <= 100
        assert task["paper"] is None  # no such size
    by_name = {t["task"]: t for t in summary["tasks"] if t["shots"] == 1}
    assert by_name["winogrande"]["acc"] == by_name["winogrande"]["acc_norm"]
    assert set(by_name["arc_easy"]["files_sha256"]) == {"test.jsonl", "train.jsonl"}
    assert set(by_name["sciq"]["files_sha256"]) == {"test.jsonl", "validation.jsonl"}
    mean = sum(t[t["shown"]] for t in by_name.values()) / 8
    assert summary["averages"][1]["mean"] == pytest.approx(mean)
    assert {path.suffix for path in out.iterdir()} == {"", ".json", ".html", ".png", ".svg"}


def test_what_is_there_is_not_computed_again(finished, checkpoint, data, task_data, monkeypatch):
    out, summary = finished
    (out / "parts" / "piqa-1-shot.json").unlink()
    (out / "parts" / "sciq-0-shot.json").write_text("{")  # cut off while it was written
    from deep_delta.evaluate.harness import Harness

    ran = []
    run = Harness.run

    def recorded(self, name, shots, *rest):
        ran.append((name, shots))
        return run(self, name, shots, *rest)

    monkeypatch.setattr(Harness, "run", recorded)
    monkeypatch.setattr("deep_delta.evaluate.run.text_loss", lambda *_: [].pop())
    settings = Settings(data=data, task_data=task_data, context=32)
    again = evaluate(checkpoint, out, settings, "ddl eval --test")
    assert ran == [("sciq", 0), ("piqa", 1)]
    assert again == summary
    limited = Settings(tasks=("piqa",), shots=(0,), task_data=task_data, context=32, limit=3)
    assert evaluate(checkpoint, out, limited, "x")["tasks"][0]["examples"] == 3
    assert ran[2:] == [("piqa", 0)], "another limit is another result"


def test_the_papers_averages_are_the_plain_means_of_its_columns():
    for rows in SCORES.values():
        assert len(rows) == 6
        for row in rows.values():
            assert len(row) == len(COLUMNS)
            assert row[-1] == pytest.approx(sum(row[:-1]) / 8, abs=0.0151)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("\n", "is empty"),
        ("[1]\n", "line 1: not a JSON object"),
        ('{"question": "a"\n', "line 1: not a JSON object"),
        ('{"question": "a", "answerKey": "A"}', "line 1: the record has no 'choices'"),
        (
            '{"question": "a", "choices": {"text": ["x"], "label": ["A"]}, "answerKey": "B"}',
            "'B' is none of the choices",
        ),
        ('{"question": "a", "choices": ["x"], "answerKey": "B"}', "as many 'text' as 'label'"),
    ],
)
def test_bad_task_files_are_one_line(tmp_path, text, expected):
    (tmp_path / "test.jsonl").write_text(text)
    fields = TASKS["arc_easy"].fields
    assert expected in user_error(lambda: read_rows(tmp_path / "test.jsonl", fields))
