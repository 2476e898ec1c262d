"""`prepare` in several processes, and from parquet files like FineWeb-Edu's: the same bytes."""

import errno
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow
import pyarrow.parquet
import pytest
from data_helpers import read_split, shard_bytes, user_error, write_jsonl

from deep_delta.data import encode as encode_module
from deep_delta.data import parquet as parquet_module
from deep_delta.data import prepare
from deep_delta.data.files import write_atomically
from deep_delta.data.writer import ShardWriter

# The package's name `prepare` is the function.
prepare_module = sys.modules["deep_delta.data.prepare"]
SETTINGS = {"val_fraction": 0.2, "shard_tokens": 5000}
ROWS = 7  # of a row group


def fineweb_table(texts: list[str | None]) -> pyarrow.Table:
    """A table with FineWeb-Edu's columns and their types."""
    count = len(texts)
    columns = {
        "text": texts,
        "id": [f"<urn:uuid:{number}>" for number in range(count)],
        "dump": ["CC-MAIN-2024-10"] * count,
        "url": [f"https://example.com/{number}" for number in range(count)],
        "file_path": ["s3://commoncrawl/crawl-data"] * count,
        "language": ["en"] * count,
        "language_score": [0.9] * count,
        "token_count": [len(text or "") // 4 for text in texts],
        "score": [3.2] * count,
        "int_score": [3] * count,
    }
    return pyarrow.table(columns)


@pytest.fixture
def fineweb(tmp_path, documents) -> list[str]:
    """Three files of several row groups, some empty documents, and a .jsonl file at the end."""
    folder = tmp_path / "sample" / "10BT"
    folder.mkdir(parents=True)
    rng = random.Random(0)
    texts = [rng.choice([*documents, " \n"]) + f" {n}" * (n % 5 > 0) for n in range(160)]
    for number in range(3):
        table = fineweb_table(texts[number * 50 : number * 50 + 50])
        path = folder / f"{number:03d}_00000.parquet"
        pyarrow.parquet.write_table(table, path, row_group_size=ROWS)
    names = [f"book {number // 2}" for number in range(10)]
    return [str(folder), str(write_jsonl(tmp_path / "more.jsonl", texts[150:], names))]


@pytest.fixture
def whole(fineweb, tmp_path) -> dict[str, bytes]:
    """What one uninterrupted process makes of it."""
    prepare(fineweb, tmp_path / "whole", **SETTINGS)
    return shard_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_processes_or_row_groups(fineweb, whole, tmp_path, monkeypatch):
    prepare(fineweb, tmp_path / "three", **SETTINGS, processes=3)
    assert shard_bytes(tmp_path / "three") == whole
    monkeypatch.setattr(parquet_module, "GROUP_BYTES", 0)  # every row group is a large one
    monkeypatch.setattr(parquet_module, "STREAM_ROWS", 3)
    prepare(fineweb, tmp_path / "streamed", **SETTINGS, processes=2)
    assert shard_bytes(tmp_path / "streamed") == whole


def slowly(inputs: list[str], out: Path, pids: Path, processes: int) -> None:
    """`prepare`, slow enough to be killed; writes the ids of its processes into the file `pids`."""
    prepare_module.CHECKPOINT_CHUNKS = 2
    encode_module.CHUNK_DOCUMENTS = 3
    add = ShardWriter.add

    def slow(*arguments):
        time.sleep(0.02)
        children = " ".join(str(child.pid) for child in multiprocessing.active_children())
        write_atomically(pids, children.encode())  # the kill may come at any moment
        add(*arguments)

    ShardWriter.add = slow
    prepare(inputs, out, **SETTINGS, processes=processes)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="kills by signal")
def test_kills_at_random_moments_leave_the_same_bytes_and_no_process(fineweb, whole, tmp_path):
    rng = random.Random(1)
    out, pids = tmp_path / "out", tmp_path / "pids"
    context = multiprocessing.get_context("forkserver")
    begun = []
    for processes in (3, 1, 2):
        pids.unlink(missing_ok=True)
        arguments = (fineweb, out, pids, processes)
        victim = context.Process(target=slowly, args=arguments)
        victim.start()
        while not pids.exists() and victim.is_alive():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        victim.kill()
        victim.join()
        assert victim.exitcode == -signal.SIGKILL, "it ended before it was killed"
        workers = [int(word) for word in pids.read_text().split()]
        assert len(workers) == (processes if processes > 1 else 0)
        deadline = time.monotonic() + 30
        while any(map(psutil.pid_exists, workers)):
            assert time.monotonic() < deadline, "processes outlive the one that started them"
            time.sleep(0.05)
        begun.append((out / "progress.json").read_text())
    assert len(set(begun)) > 1, "every run began anew"
    prepare(fineweb, out, **SETTINGS, processes=2)
    assert shard_bytes(out) == whole


def test_finished_row_groups_are_not_read_again(fineweb, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "CHECKPOINT_CHUNKS", 1)
    read = []
    documents_of = parquet_module.RowGroup.documents

    def recording(group):
        read.append((Path(group.location).name[:3], group.number, group.start, group.stop))
        if len(read) == 12:
            raise KeyboardInterrupt
        return documents_of(group)

    monkeypatch.setattr(parquet_module.RowGroup, "documents", recording)
    with pytest.raises(KeyboardInterrupt):
        prepare(fineweb, tmp_path / "out", **SETTINGS)
    # Eight row groups a file, the last of one row.
    assert read[6:9] == [("000", 6, 42, 49), ("000", 7, 49, 50), ("001", 0, 0, 7)]
    batches, iter_batches = [], pyarrow.parquet.ParquetFile.iter_batches

    def counting(file, *arguments, row_groups, columns):
        batches.append((row_groups, columns))
        return iter_batches(file, *arguments, row_groups=row_groups, columns=columns)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", counting)
    monkeypatch.setattr(parquet_module.RowGroup, "documents", documents_of)
    prepare(fineweb, tmp_path / "out", **SETTINGS)
    assert batches == [([n], ["text"]) for n in [*range(3, 8), *range(8)]]
    assert shard_bytes(tmp_path / "out") == whole


@pytest.mark.parametrize("start", [0, 1, 6, 7, 8, 48, 49, 50])
def test_a_file_can_be_read_from_any_row(fineweb, start):
    path = str(next(Path(fineweb[0]).glob("001*")))
    expected = pyarrow.parquet.read_table(path)["text"].to_pylist()[start:]
    groups = list(parquet_module.pieces(path, "", start))
    assert [document.text for group in groups for document in group.documents()] == expected


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.slow
def test_max_tokens_ends_with_the_same_document(
    processes, fineweb, whole, tmp_path, monkeypatch, capsys
):
    everything = read_split(tmp_path / "whole", "train")
    wanted = len(everything) // 2
    made = prepare(fineweb, tmp_path / "a", **SETTINGS, max_tokens=wanted, processes=processes)
    train = read_split(tmp_path / "a", "train")
    ends = (train == made.eot_id).nonzero()[0] + 1
    assert len(train) >= wanted > ends[-2]
    assert train.tolist() == everything[: len(train)].tolist()

    # Other chunks, and stopped in between: the same files.
    monkeypatch.setattr(encode_module, "CHUNK_DOCUMENTS", 1)
    monkeypatch.setattr(parquet_module, "GROUP_BYTES", 0)
    monkeypatch.setattr(prepare_module, "CHECKPOINT_CHUNKS", 1)
    add, left = ShardWriter.add, 30

    def stopping(*arguments):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        add(*arguments)

    monkeypatch.setattr(ShardWriter, "add", stopping)
    with pytest.raises(KeyboardInterrupt):
        prepare(fineweb, tmp_path / "b", **SETTINGS, max_tokens=wanted)
    prepare(fineweb, tmp_path / "b", **SETTINGS, max_tokens=wanted, processes=processes)
    assert shard_bytes(tmp_path / "b") == shard_bytes(tmp_path / "a")

    capsys.readouterr()
    prepare(fineweb, tmp_path / "c", **SETTINGS, max_tokens=10**9)
    assert f"only {len(everything):,} training tokens" in capsys.readouterr().err


def test_a_bad_row_is_named_from_another_process(fineweb, tmp_path):
    table = fineweb_table(["fine"] * 20 + [None] + ["fine"] * 20)
    path = tmp_path / "sample" / "10BT" / "001_00000.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=ROWS)
    message = user_error(lambda: prepare(fineweb, tmp_path / "out", processes=2))
    assert message == f'{path}, row 21: the record has no "text" string'


def test_a_process_that_ends_is_one_line_and_the_run_goes_on_later(
    fineweb, whole, tmp_path, monkeypatch
):
    monkeypatch.setattr(encode_module, "CHUNK_DOCUMENTS", 3)
    add = ShardWriter.add

    def fatal(*arguments):
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGTERM)
            child.join()
        add(*arguments)

    monkeypatch.setattr(ShardWriter, "add", fatal)
    message = user_error(lambda: prepare(fineweb, tmp_path / "out", **SETTINGS, processes=2))
    assert message.startswith("a process that tokenizes ended (exit code -15)")
    assert not multiprocessing.active_children()
    monkeypatch.setattr(ShardWriter, "add", add)
    prepare(fineweb, tmp_path / "out", **SETTINGS, processes=2)
    assert shard_bytes(tmp_path / "out") == whole


def test_too_many_processes_are_one_line(fineweb, tmp_path, monkeypatch):
    def refuse(_):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
    message = user_error(lambda: prepare(fineweb, tmp_path / "out", processes=2))
    assert message == "can't start 2 processes: Resource temporarily unavailable"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C as a signal to a process group")
@pytest.mark.parametrize("when", ["starting", "working"])
def test_ctrl_c_is_one_line(when, fineweb, tmp_path):
    """Also while processes are being started; the terminal sends the signal to all of them."""
    words = ["prepare", *fineweb * 40, "--out", str(tmp_path / "out"), "--processes", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "deep_delta_cli", *words],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that a shell runs in the background ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    awaited = "progress.json" if when == "starting" else "train-00000.bin"
    while not (tmp_path / "out" / awaited).exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    line = "ddl: interrupted; the same command goes on where it stopped"
    assert process.communicate(timeout=60)[1].splitlines() == [line]
    assert process.returncode == 130
