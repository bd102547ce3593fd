import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from timm.scheduler import create_scheduler_v2

from semivim.runs.run_folder import (
    check_unchanged,
    find_checkpoint,
    load_schedule_state,
    own_folder,
    refuse_going_back,
    refuse_other_run,
    restore,
    run_folder,
    schedule_state,
)


def test_folder_is_named_by_the_run_the_file_or_the_time(tmp_path):
    assert run_folder("out", "name", "auto", "vim", "lyapema").as_posix() == "out/name"
    assert run_folder("out", "name", "a/b.pth.tar", "vim", "lyapema").as_posix() == "out/name"
    assert run_folder("", "", "a/b.pth.tar", "vim", "lyapema").as_posix() == "a"
    named = run_folder("", "", "", "hf-hub:org/name", "lyapema")
    assert named.parent.as_posix() == "output/train"
    assert named.name.endswith("-hf-hub-org-name-lyapema")


def test_auto_takes_the_newest(tmp_path):
    assert find_checkpoint("", tmp_path) is None
    assert find_checkpoint("auto", tmp_path) is None
    assert find_checkpoint("x.pth.tar", tmp_path).name == "x.pth.tar"
    for name in ("checkpoint-9", "last"):
        (tmp_path / f"{name}.pth.tar").touch()
    assert find_checkpoint("auto", tmp_path).name == "last.pth.tar"
    for age, name in enumerate(("recovery-1-9", "recovery-1-10", "recovery-0-11")):  # a copy may have any age
        (tmp_path / f"{name}.pth.tar").touch()
        os.utime(tmp_path / f"{name}.pth.tar", (100 + age, 100 + age))
    assert find_checkpoint("auto", tmp_path).name == "recovery-1-10.pth.tar"


@pytest.mark.parametrize("name", ["last", "recovery-0-2", "checkpoint-3", "model_best"])
def test_folder_with_any_whole_checkpoint_holds_a_run(name, tmp_path):
    (tmp_path / "recovery_tmp.pth.tar").touch()  # what a kill while writing leaves
    (tmp_path / "args.yaml").touch()
    refuse_other_run(tmp_path)
    refuse_other_run(tmp_path / "absent")
    (tmp_path / f"{name}.pth.tar").touch()
    found = "auto" if name.startswith(("last", "recovery")) else f".*{name}.pth.tar"
    with pytest.raises(ValueError, match=f"holds a run already: add --resume {found} to go on"):
        refuse_other_run(tmp_path)


OWNER = """
import os, sys, time
from pathlib import Path
from semivim.runs.run_folder import own_folder
with own_folder(Path(sys.argv[1]), "", None):
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
        with pytest.raises(ValueError, match="run is in use by another process"), own_folder(folder, "", None):
            pass
        owner.kill()
        owner.wait()
        with own_folder(folder, "", None):
            pass
    finally:
        os.killpg(owner.pid, 9)
        owner.wait()
        owner.stdout.close()


def test_folder_that_cannot_be_written_is_one_line():
    with (
        pytest.raises(ValueError, match=r"--output: cannot write to /proc/x/run: No such file"),
        own_folder(Path("/proc/x/run"), "", None),
    ):
        pass


def test_folder_in_which_another_process_trained_meanwhile_is_refused(tmp_path):
    last = tmp_path / "last.pth.tar"
    last.touch()
    with pytest.raises(ValueError, match="holds a run already"), own_folder(tmp_path, "auto", None):
        pass
    with own_folder(tmp_path, "auto", last):
        (tmp_path / "recovery-1-7.pth.tar").touch()
    with pytest.raises(ValueError, match="another process went on with this run"), own_folder(tmp_path, "auto", last):
        pass


def test_going_back_behind_the_best_model_is_refused(tmp_path):
    path = tmp_path / "checkpoint-0.pth.tar"
    refuse_going_back(path, 1)
    (tmp_path / "best.json").write_text('{"epoch": 2}')
    refuse_going_back(path, 3)
    with pytest.raises(ValueError, match=r"checkpoint-0.pth.tar goes back behind the best model .*epoch 2"):
        refuse_going_back(path, 2)


RUN = {
    "label_fraction": None, "labels_per_class": 4, "min_per_class": 1, "imb_n1": None, "imb_m1": None,
    "imb_factor_l": 1.0, "imb_factor_u": 1.0, "labeled_list": None, "unlabeled_list": None,
    "unlabeled_include_labeled": False, "fold": 0, "split_seed": 0, "unlabeled_ratio": 5,
    "labelled_per_update": 64, "updates_per_epoch": 10, "opt": "sgd", "opt_eps": None, "opt_betas": None,
    "opt_kwargs": {}, "momentum": 0.9, "weight_decay": 1e-4, "layer_decay": None, "layer_decay_min_scale": 0,
    "layer_decay_no_opt_scale": None, "lr": 0.1, "epochs": 5, "workers": 4,
}  # fmt: skip


def test_what_a_resumed_run_may_not_change():
    check_unchanged(RUN, RUN | {"lr": 0.2, "epochs": 9, "workers": 0}, keep_optimizer=True)
    for name, value, message in (
        ("labels_per_class", 8, r"--labels-per-class is 8, but 4 in the run to resume"),
        ("split_seed", 7, r"--split-seed is 7, but 0"),
        ("unlabeled_ratio", 3, r"--unlabeled-ratio is 3, but 5"),
        ("labelled_per_update", 32, r"--batch-size x --grad-accum-steps x processes is 32, but 64"),
        ("updates_per_epoch", 20, r"--train-batches-per-epoch is 20, but 10"),
        ("weight_decay", 0.1, r"--weight-decay is 0\.1, but 0\.0001"),
    ):
        with pytest.raises(ValueError, match=message):
            check_unchanged(RUN, RUN | {name: value}, keep_optimizer=True)
    check_unchanged(RUN, RUN | {"weight_decay": 0.1, "opt": "adamw"}, keep_optimizer=False)
    with pytest.raises(ValueError, match="written by an older semivim"):
        check_unchanged({k: v for k, v in RUN.items() if k != "labelled_per_update"}, RUN, keep_optimizer=True)


def test_what_args_yaml_writes_another_way_is_no_change():
    saved = RUN | {"opt_kwargs": {"betas": (0.9, 0.95)}, "labeled_list": "labels.txt"}
    check_unchanged(
        saved, RUN | {"opt_kwargs": {"betas": [0.9, 0.95]}, "labeled_list": os.path.abspath("labels.txt")}, True
    )
    with pytest.raises(ValueError, match="--labeled-list is .*other.txt, but .*labels.txt"):
        check_unchanged(saved, saved | {"labeled_list": "other.txt"}, True)


def test_flags_that_are_watched_exist():
    import train_ssl

    flags = set(RUN) - {"labelled_per_update", "updates_per_epoch"}
    assert flags <= set(vars(train_ssl.parse_args([])))


def test_another_models_checkpoint_is_named():
    with pytest.raises(ValueError, match=r"^--resume a\.pth: not a checkpoint of this run: KeyError 'state_dict'$"):
        restore({}, "a.pth", SimpleNamespace(load_checkpoint_state=None), None, None, None)


def plateau():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # timm's word on what is tested here
        scheduler, _ = create_scheduler_v2(
            optimizer, "plateau", num_epochs=20, patience_epochs=2, decay_rate=0.5, noise=[0.3, 0.9], noise_seed=1
        )
    return optimizer, scheduler


def test_plateau_continues_where_it_was(tmp_path):
    metrics = [1.0, 2.0, 2.0, 2.0, None, 2.0, 2.0, 3.0, 2.0, 2.0, 2.0, 2.0]
    optimizer, scheduler = plateau()
    rates = []
    for epoch, metric in enumerate(metrics):
        scheduler.step(epoch + 1, metric)
        rates.append(optimizer.param_groups[0]["lr"])
    assert len(set(rates)) > 4
    for cut in range(1, len(metrics)):
        optimizer, scheduler = plateau()
        for epoch in range(cut):
            scheduler.step(epoch + 1, metrics[epoch])
        torch.save({"schedule": schedule_state(scheduler), "optimizer": optimizer.state_dict()}, tmp_path / "s.pt")
        saved = torch.load(tmp_path / "s.pt", weights_only=True)
        optimizer, scheduler = plateau()
        optimizer.load_state_dict(saved["optimizer"])
        load_schedule_state(scheduler, saved["schedule"])
        scheduler.step(cut)
        assert optimizer.param_groups[0]["lr"] == rates[cut - 1]
        for epoch in range(cut, len(metrics)):
            scheduler.step(epoch + 1, metrics[epoch])
            assert optimizer.param_groups[0]["lr"] == rates[epoch], (cut, epoch)


def test_schedules_of_the_position_have_no_state():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    assert schedule_state(create_scheduler_v2(optimizer, "cosine", num_epochs=3)[0]) == {}
