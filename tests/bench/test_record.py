"""The rows of a benchmark: the CSV's header and columns, an unknown commit, the table."""

import csv

import pytest

from deep_delta.bench import record
from deep_delta.errors import UserError
from deep_delta.report import provenance


def test_rows_are_appended_and_the_header_is_written_once(tmp_path, capsys):
    path = tmp_path / "new" / "rows.csv"
    for number in range(2):
        rows = record.Record(f"ddl bench {number}", path)
        rows.add("a line", level="op", ms="1.5")
        assert not rows.failed
    rows.add("another", level="op", status="differs from the reference: x, y")
    assert rows.failed
    assert capsys.readouterr().out.splitlines() == [
        "a line", "a line", "another: differs from the reference: x, y"
    ]  # fmt: skip
    lines = path.read_text().splitlines()
    assert [line.startswith("date,commit,command,") for line in lines] == [True, *[False] * 3]
    with path.open() as file:
        first, second, third = csv.DictReader(file)
    assert (first["command"], first["ms"], first["status"]) == ("ddl bench 0", "1.5", "ok")
    assert second["command"] == "ddl bench 1"
    assert (third["ms"], third["status"]) == ("", "differs from the reference: x, y")
    assert all(first[name] for name in ("date", "commit", "device", "torch", "transformers"))


def test_a_csv_with_other_columns_is_left_alone(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="other columns"):
        record.Record("ddl", path)
    assert path.read_text() == "a,b\n1,2\n"


def test_a_csv_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for path, why in ((tmp_path, "Is a directory"), (tmp_path / "file" / "x.csv", "exists")):
        with pytest.raises(UserError, match=f"cannot be written: .*{why}"):
            record.Record("ddl", path)


def test_a_commit_that_nothing_tells_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    monkeypatch.delenv("DDL_COMMIT", raising=False)
    assert record.environment("ddl")["commit"] == "unknown"


def test_table():
    rows = [{"a": "1", "long name": ""}, {"a": "two", "long name": "x"}]
    assert record.table(rows) == (
        "| a   | long name |\n| --- | --------- |\n| 1   |           |\n| two | x         |\n"
    )
