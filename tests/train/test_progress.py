"""The progress line."""

from deep_delta.train import progress


def test_time_left_does_not_count_the_start_up(monkeypatch, capsys):
    clock = iter([0.0, 60.0, 60.0, 70.0])  # made, first update twice, second update
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    line = progress.ProgressLine("additive seed 0", steps=100, start=50)
    line.update(60, 4.0, 1000.0)
    line.update(70, 4.0, 1000.0)
    printed = capsys.readouterr().err.splitlines()
    assert printed[0].endswith("ETA 4:00")  # 10 steps in 60 s, all there is to go by
    assert printed[1].endswith("ETA 0:30")  # 10 steps in 10 s


def test_a_live_line_needs_a_terminal_to_itself(monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    assert progress.ProgressLine("additive seed 0", steps=100).live
    parent = object()  # as in a process that another one started
    monkeypatch.setattr(progress.multiprocessing, "parent_process", lambda: parent)
    assert not progress.ProgressLine("additive seed 0", steps=100).live
