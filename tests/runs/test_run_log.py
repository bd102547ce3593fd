import io
import json
import re
import sys
import time

import pytest

from semivim.runs import run_log
from semivim.runs.run_log import RunLog, fitting, read_jsonl


def test_log_lines_and_records(tmp_path, capsys):
    log = RunLog(tmp_path, total_updates=4)
    log.step(8)
    log.record({"loss_labelled": 1.5, "lr": 0.1})
    log.record({"teacher_top1": 50.0})
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "loading the first batch"
    assert lines[1].startswith("[1/4 eta ")
    assert "loss_labelled 1.5" in lines[1]
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["update"] == 1
    assert records[0]["images_per_s"] > 0
    assert "images_per_s" not in records[1]  # evaluation is not training speed


def test_resume_drops_later_records_and_a_line_cut_short(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"update": 1}\n{"update": 2}\n{"update": 3}\n{"upda')
    assert [r["update"] for r in read_jsonl(path)] == [1, 2, 3]
    log = RunLog(tmp_path, total_updates=4, first_update=2)
    log.step(1)
    log.record({})
    assert [r["update"] for r in read_jsonl(path)] == [1, 2, 3]
    assert [r["update"] for r in log.records] == [1, 2, 3]


def test_rows_and_evaluations_of_an_unfinished_epoch_are_dropped(tmp_path):
    metrics = {"top1": 50.0, "top5": 90.0, "confusion": []}
    columns = {"train_columns": ("loss", "kept_share"), "eval_columns": ("top1", "top5")}
    log = RunLog(tmp_path, total_updates=2, **columns)
    for epoch in (0, 1):
        log.step(1)
        log.record({"loss": 1.0})
        if epoch:
            log.record({"epoch": epoch, "top1": 50.0})
        log.epoch(epoch, {"loss": 1.0, "skipped": 0.0}, metrics if epoch else {}, 0.1)
    rows = (tmp_path / "summary.csv").read_text().splitlines()
    assert rows == ["epoch,train_loss,train_kept_share,eval_top1,eval_top5,lr", "0,1.0,,,,0.1", "1,1.0,,50.0,90.0,0.1"]
    assert [r.get("epoch") for r in log.records] == [None, None, 1]
    again = RunLog(tmp_path, total_updates=2, first_update=2, first_epoch=1, **columns)
    assert [r.get("epoch") for r in again.records] == [None, None]
    assert (tmp_path / "summary.csv").read_text().splitlines() == rows[:2]


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = RunLog(None, total_updates=4)
    log.step(1)
    log.record({"loss": 1.0})
    log.say("hello")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("columns", [80, 100])
def test_the_bar_is_readable_and_evaluations_stay_on_screen(columns, tmp_path, capsys, monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (columns, 24))
    log = RunLog(tmp_path, total_updates=100_000, train_columns=("loss_labelled", "loss_unlabelled"))
    log.bar.mininterval = 0
    for _ in range(500):
        log.step(8)
    figures = {"lr": 0.1234567, "loss_labelled": 1.234567, "loss_unlabelled": 2.345678, "alpha": 0.999123, "v": 123.4}
    log.record(figures)
    log.bar.refresh()
    shown = screen.getvalue().split("\r")[-1]
    assert len(shown) <= columns
    assert re.search(r"\|.{10}\| 500/100000 \[.*left, loss_labelled 1\.235", shown), shown
    assert shown.endswith("]")
    log.record({"epoch": 3, "teacher_balanced_acc": 51.25})
    assert "teacher_balanced_acc 51.25" in capsys.readouterr().out
    assert "teacher_balanced_acc" not in screen.getvalue()
    log.close()


def test_words_that_fit():
    assert fitting(["aa", "b", "aa", "ccc"], 4) == "aa b"
    assert fitting(["aa", "b"], 1) == fitting(["aa"], -5) == ""


def test_a_slow_first_batch_is_not_silent(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_log, "FIRST_LINE_S", 0.05)
    log = RunLog(tmp_path, total_updates=17)  # a number of its own: logs of other tests may still speak
    time.sleep(0.3)
    log.close()
    assert capsys.readouterr().out.count("[0/17] 0 updates in the first 0.05 s") == 1
    log = RunLog(tmp_path, total_updates=17)
    log.record({"loss": 1.0})
    time.sleep(0.2)
    assert "[0/17] 0 updates in the first" not in capsys.readouterr().out
    log.close()
