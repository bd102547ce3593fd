import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from semivim.runs.run_folder import (
    check_unchanged,
    find_checkpoints,
    lock_folder,
    numbered_checkpoint,
    refuse_going_back,
    refuse_other_run,
    remove_checkpoint,
    run_folder,
)
from semivim.utils.user_error import UserError


def test_folder_is_named_by_the_run_the_file_or_the_time(tmp_path):
    assert run_folder("out", "name", "auto", "vim-lyapema").as_posix() == "out/name"
    assert run_folder("out", "name", "a/b.pth.tar", "vim-lyapema").as_posix() == "out/name"
    assert run_folder("", "", "a/b.pth.tar", "vim-lyapema").as_posix() == "a"
    named = run_folder("", "", "", "hf-hub:org/name-lyapema")
    assert named.parent.as_posix() == "output/train"
    assert named.name.endswith("-hf-hub-org-name-lyapema")


def test_auto_takes_the_newest(tmp_path):
    assert find_checkpoints("", tmp_path) == []
    assert find_checkpoints("auto", tmp_path) == []
    assert find_checkpoints("x.pth.tar", tmp_path) == [Path("x.pth.tar")]
    for name in ("checkpoint-9", "checkpoint-10", "last", "model_best", "recovery_tmp", "checkpoint-x", "recovery-1-x"):
        (tmp_path / f"{name}.pth.tar").touch()
    names = ["last.pth.tar", "checkpoint-10.pth.tar", "checkpoint-9.pth.tar"]
    assert [path.name for path in find_checkpoints("auto", tmp_path)] == names
    for age, name in enumerate(("recovery-1-9", "recovery-1-10", "recovery-0-11")):  # a copy may have any age
        (tmp_path / f"{name}.pth.tar").touch()
        os.utime(tmp_path / f"{name}.pth.tar", (100 + age, 100 + age))
    names = ["recovery-1-10.pth.tar", "recovery-1-9.pth.tar", "recovery-0-11.pth.tar", *names]
    assert [path.name for path in find_checkpoints("auto", tmp_path)] == names


FOREIGN_NAMES = (
    "/any/file", "../../x", "../checkpoint-1.pth.tar", "a/checkpoint-1.pth.tar", "checkpoint-../../x.pth.tar", "",
    "checkpoint-1.pth.tar\n", "last.pth.tar", "args.yaml", ".", "..", "checkpoint-1.pth.tar\0", None, 3, b"x",
)  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN_NAMES, ids=repr)
def test_foreign_names_lead_to_no_file(name, tmp_path):
    with pytest.raises(UserError, match="wanted the name of a numbered checkpoint, got") as error:
        remove_checkpoint(tmp_path, name)
    assert "\n" not in str(error.value)


def test_numbered_checkpoints_are_removed_directly_in_the_folder(tmp_path):
    for name in ("checkpoint-12.pth.tar", "recovery-0-7.pth.tar"):
        path = numbered_checkpoint(tmp_path, name)
        path.touch()
        remove_checkpoint(tmp_path, name)
        remove_checkpoint(tmp_path, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["last", "recovery-0-2", "checkpoint-3", "model_best"])
def test_folder_with_any_whole_checkpoint_holds_a_run(name, tmp_path):
    (tmp_path / "recovery_tmp.pth.tar").touch()  # what a kill while writing leaves
    (tmp_path / "args.yaml").touch()
    refuse_other_run(tmp_path)
    refuse_other_run(tmp_path / "absent")
    (tmp_path / f"{name}.pth.tar").touch()
    found = "auto" if name != "model_best" else f".*{name}.pth.tar"
    with pytest.raises(UserError, match=f"holds a run already: add --resume {found} to go on"):
        refuse_other_run(tmp_path)


OWNER = """
import os, sys, time
from pathlib import Path
from semivim.runs.run_folder import lock_folder
with lock_folder(Path(sys.argv[1]), "", []):
    if os.fork() == 0:  # as a loader process, which outlives a killed run
        time.sleep(600)
    print("ready", flush=True)
    time.sleep(600)
"""


def test_folder_belongs_to_one_process_until_it_ends(tmp_path):
    folder = tmp_path / "new" / "run"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(folder)], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert owner.stdout.readline() == b"ready\n"
        with pytest.raises(UserError, match="run is in use by another process"), lock_folder(folder, "", []):
            pass
        owner.kill()
        owner.wait()
        with lock_folder(folder, "", []):
            pass
    finally:
        os.killpg(owner.pid, 9)
        owner.wait()
        owner.stdout.close()


def test_leftovers_of_killed_runs_are_swept_and_nothing_else(tmp_path):
    kept = (".lock", "last.pth.tar", "recovery-0-7.pth.tar", "args.yaml", ".notes.tmp", ".model-zoo", "tmp", "a.link")
    for name in (*kept, ".last.pth.tar.123.tmp", ".args.yaml.7.tmp", "last.pth.tar.link", "good.pth.tar.link",
                 "tmp.pth.tar", "recovery_tmp.pth.tar"):  # fmt: skip
        (tmp_path / name).touch()
    (tmp_path / ".model-ab_d3fgh").mkdir()
    (tmp_path / ".model-ab_d3fgh" / "model.safetensors").touch()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    (tmp_path / ".model-linked__").symlink_to(outside)
    with lock_folder(tmp_path, "auto", find_checkpoints("auto", tmp_path)):
        assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*kept, "outside"])
    assert (outside / "file").exists()


def test_folder_that_cannot_be_written_is_one_line():
    with (
        pytest.raises(UserError, match=r"--output: cannot write to /proc/x/run: No such file"),
        lock_folder(Path("/proc/x/run"), "", []),
    ):
        pass


def test_folder_in_which_another_process_trained_meanwhile_is_refused(tmp_path):
    last = tmp_path / "last.pth.tar"
    last.touch()
    with pytest.raises(UserError, match="holds a run already"), lock_folder(tmp_path, "auto", []):
        pass
    with lock_folder(tmp_path, "auto", [last]):
        (tmp_path / "recovery-1-7.pth.tar").touch()
    with pytest.raises(UserError, match="another process went on with this run"), lock_folder(tmp_path, "auto", [last]):
        pass


def test_going_back_behind_the_best_model_is_refused(tmp_path):
    path = tmp_path / "checkpoint-0.pth.tar"
    refuse_going_back(path, 1)
    (tmp_path / "best.json").write_text('{"epoch": 2}')
    refuse_going_back(path, 3)
    with pytest.raises(UserError, match=r"checkpoint-0.pth.tar goes back behind the best model .*epoch 2"):
        refuse_going_back(path, 2)


RUN = {"labels_per_class": 4, "labelled_per_update": 64, "weight_decay": 1e-4, "opt_kwargs": {}, "lists": None}
FIXED = {
    "labels_per_class": "--labels-per-class",
    "labelled_per_update": "--batch-size x processes",
    "weight_decay": "--weight-decay",
    "opt_kwargs": "--opt-kwargs",
    "lists": "--lists",
}


def test_what_a_resumed_run_may_not_change():
    check_unchanged(RUN, RUN | {"lr": 0.2}, FIXED)
    for name, value, message in (
        ("labels_per_class", 8, r"--labels-per-class is 8, but 4 in the run to resume, .* give 4, or start another"),
        ("labelled_per_update", 32, r"--batch-size x processes is 32, but 64"),
        ("weight_decay", 0.1, r"--weight-decay is 0\.1, but 0\.0001"),
        ("lists", "new.txt", r"--lists is new\.txt, but None"),
    ):
        with pytest.raises(UserError, match=message):
            check_unchanged(RUN, RUN | {name: value}, FIXED)
        check_unchanged(RUN, RUN | {name: value}, {k: v for k, v in FIXED.items() if k != name})
    with pytest.raises(UserError, match="--labels-per-class is 4, but None"):
        check_unchanged({}, RUN, FIXED)


def test_what_args_yaml_writes_another_way_is_no_change():
    saved = RUN | {"opt_kwargs": {"betas": (0.9, 0.95)}, "lists": "labels.txt"}
    given = {"opt_kwargs": {"betas": [0.9, 0.95]}, "lists": os.path.abspath("labels.txt")}
    check_unchanged(saved, RUN | given, FIXED)
    with pytest.raises(UserError, match="--lists is other.txt, but labels.txt"):
        check_unchanged(saved, saved | {"lists": "other.txt"}, FIXED)


def test_a_foreign_value_that_no_flag_has_is_named():
    with pytest.raises(UserError, match=r"^--lr is tensor\(\[1\.\]\) in the run to resume, no value of a flag"):
        check_unchanged({"lr": torch.ones(1)}, {"lr": 0.1}, {"lr": "--lr"})
