import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import train_ssl

ROOT = Path(__file__).parent.parent
TINY = ["--model", "test_vim", "-b", "4", "--unlabeled-ratio", "2", "--epochs", "2", "--train-batches-per-epoch", "3"]
TINY += ["--val-interval", "1", "-vb", "250", "--log-interval", "1", "--threshold", "0.05", "--warmup-epochs", "0"]


def run(folder, *flags):
    return train_ssl.main([*TINY, "--output", str(folder.parent), "--experiment", folder.name, *map(str, flags)])


def states(folder, name="last.pth.tar"):
    checkpoint = torch.load(folder / name, weights_only=False)
    return checkpoint["state_dict"], checkpoint["state_dict_ema"]


def assert_same_run(a, b):
    for first, second in zip(states(a), states(b), strict=True):
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An unbroken run of six updates in two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    results = run(folder)
    return folder, results


def test_run_folder_holds_everything(whole):
    folder, results = whole
    names = {p.name for p in folder.iterdir()}
    wanted = {
        "args.yaml",
        "labelled.txt",
        "unlabelled.txt",
        "summary.csv",
        "metrics.jsonl",
        "metrics.json",
        "curves.png",
    }
    assert wanted | {"last.pth.tar", "model_best.pth.tar", "model.safetensors", "config.json"} <= names
    assert not [n for n in names if "tmp" in n]
    stored = json.loads((folder / "metrics.json").read_text())
    assert stored["teacher"]["top1"] == results["teacher"]["top1"]
    assert stored["split"]["num_labelled"] == 40
    assert stored["updates"] == 6
    assert stored["best"]["top1"] == torch.load(folder / "model_best.pth.tar", weights_only=False)["metric"]
    assert len(stored["best"]["per_class_recall"]) == 10
    assert [int(row["epoch"]) for row in csv.DictReader((folder / "summary.csv").read_text().splitlines())] == [0, 1]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [r for r in records if "loss_labelled" in r]
    assert [r["update"] for r in logged] == [1, 2, 3, 4, 5, 6]
    assert {"loss_unlabelled", "kept_share", "pseudo_accuracy", "alpha", "v", "guard_rate", "lr"} <= set(logged[-1])
    assert all(0 < r["kept_share"] <= 1 for r in logged)
    with Image.open(folder / "curves.png") as picture:
        assert picture.size[0] > 500
    # the written arguments start the same run again
    assert train_ssl.parse_args(["-c", str(folder / "args.yaml")]).model == "test_vim"


def test_teacher_loads_into_timm(whole):
    folder, _ = whole
    best = states(folder, "model_best.pth.tar")[1]
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(best[key], weights[key]) for key in best)
    model = timm.create_model(
        "test_vim", num_classes=10, in_chans=1, checkpoint_path=str(folder / "model.safetensors")
    ).eval()
    hub = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    image = torch.randn(2, *hub.pretrained_cfg["input_size"])
    assert torch.equal(model(image), hub(image))
    assert list(hub.pretrained_cfg["mean"]) == train_ssl.DEMO["mean"]
    assert hub.pretrained_cfg["label_names"] == [str(i) for i in range(10)]


def test_finished_folder_is_not_overwritten(whole):
    folder, _ = whole
    before = (folder / "last.pth.tar").read_bytes()
    with pytest.raises(SystemExit, match="holds a run already"):
        run(folder)
    assert (folder / "last.pth.tar").read_bytes() == before


def test_epochs_go_to_weights_and_biases_too(tmp_path, monkeypatch):
    rows = []

    class Wandb:
        init = staticmethod(lambda **kwargs: rows.append(kwargs))
        log = staticmethod(rows.append)

    monkeypatch.setattr(train_ssl, "wandb", Wandb)
    monkeypatch.setattr("timm.utils.summary.wandb", Wandb, raising=False)
    run(
        tmp_path / "run",
        "--epochs",
        1,
        "--ssl-method",
        "supervised",
        "--threshold",
        0.7,
        "--log-wandb",
        "--wandb-project",
        "p",
    )
    assert rows[0]["project"] == "p"
    assert rows[1]["eval_top1"] >= 0.0
    monkeypatch.setattr(train_ssl, "wandb", None)
    with pytest.raises(SystemExit):
        run(tmp_path / "other", "--log-wandb")


def test_resume_at_an_epoch_equals_the_unbroken_run(whole, tmp_path):
    folder = tmp_path / "broken"
    run(folder, "--epochs", 2, "--checkpoint-hist", 5)
    split = (folder / "labelled.txt").read_text()
    os.replace(folder / "checkpoint-0.pth.tar", folder / "last.pth.tar")
    # another seed of the split: a resumed run must keep the one it began with
    run(folder, "--resume", folder / "last.pth.tar", "--split-seed", 7)
    assert (folder / "labelled.txt").read_text() == split
    assert_same_run(folder, whole[0])
    assert [int(row["epoch"]) for row in csv.DictReader((folder / "summary.csv").read_text().splitlines())] == [0, 1]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["update"] for r in records if "loss_labelled" in r] == [1, 2, 3, 4, 5, 6]


def test_run_killed_in_the_middle_of_an_epoch_continues(whole, tmp_path):
    folder = tmp_path / "killed"
    flags = [*TINY, "--output", str(tmp_path), "--experiment", "killed", "--recovery-interval", "1", "--resume", "auto"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "train_ssl.py", *flags], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(folder.glob("recovery-0-2*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    updates = [torch.load(f, weights_only=False)["task_state"]["num_updates"] for f in folder.glob("recovery-*.tar")]
    assert max(updates) >= 2
    train_ssl.main(flags)
    assert_same_run(folder, whole[0])


@pytest.mark.parametrize(
    "flags",
    [
        ["--ssl-method", "supervised", "--threshold", "0.7"],
        ["--ssl-method", "fixmatch", "--pseudo-mixup", "none"],
        ["--ssl-method", "ema-teacher", "--pseudo-mixup", "prob"],
        [
            "--lyap-mode",
            "paper_stable",
            "--amp",
            "--amp-dtype",
            "bfloat16",
            "--ssmixup-c",
            "mean",
            "--ssmixup-layers",
            "2",
        ],
        [
            "--mixup",
            "0.2",
            "--cutmix",
            "1.0",
            "--grad-accum-steps",
            "2",
            "--clip-grad",
            "1.0",
            "--opt",
            "sgd",
            "-j",
            "1",
        ],
    ],
    ids=lambda flags: " ".join(flags[:4]),
)
def test_every_method_trains(flags, tmp_path):
    results = run(tmp_path / "run", "--epochs", 1, *flags)
    assert results["updates"] == 3
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(torch.tensor(r["loss_labelled"]).isfinite() for r in records if "loss_labelled" in r)
    assert ("loss_unlabelled" in records[0]) == ("supervised" not in flags)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("validation", 2)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(256, (40, 36, 3), generator=generator, dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    (root / "more" / "deep").mkdir(parents=True)
    for i in range(5):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(root / "more" / "deep" / f"{i}.png")
    return root


def test_folders_unlabelled_folder_and_a_broken_image(image_folder, tmp_path):
    broken = image_folder / "more" / "deep" / "broken.png"
    broken.write_bytes(b"not an image")
    flags = ["--data-dir", image_folder, "--labels-per-class", 2, "--unlabeled-dir", image_folder / "more"]
    results = run(tmp_path / "run", *flags, "-j", 0)
    assert results["class_names"] == ["cat", "dog"]
    assert results["split"]["num_unlabelled"] == 12 + 6
    assert list(results["unreadable_images"]) == [str(broken)]


def test_broken_validation_image_is_an_error_that_names_it(image_folder, tmp_path):
    broken = image_folder / "validation" / "cat" / "9.png"
    broken.write_bytes(b"not an image")
    with pytest.raises(SystemExit, match=r"9\.png"):
        run(tmp_path / "run", "--data-dir", image_folder, "--labels-per-class", 2, "-j", 0)
    broken.unlink()


def test_gradients_that_stay_infinite_stop_the_run_and_leave_the_last_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(train_ssl, "MAX_SKIPPED_STEPS", 2)
    folder = tmp_path / "run"
    with pytest.raises(SystemExit, match=r"not finite in 3 steps in a row.*last\.pth\.tar"):
        run(
            folder, "--lr", "1e38", "--opt", "sgd", "--sched", "constant", "--epochs", 5, "--train-batches-per-epoch", 1
        )
    assert all(value.isfinite().all() for value in states(folder)[1].values())


BAD = [
    (["--labels-per-clas", "4"], 2, r"did you mean --labels-per-class"),
    (["--batch-size", "0"], 2, r"argument -b/--batch-size: 0 is not a whole number >= 1"),
    (["--label-fraction", "0.1"], 2, r"got --label-fraction and --labels-per-class"),
    (["--ssl-method", "magic"], 2, r"--ssl-method: invalid choice: 'magic'"),
    (["--resume", "auto"], 2, r"--resume auto: needs --experiment"),
    (["--labels-per-class", "1000"], 1, r"1000"),
    (["--num-classes", "5"], 1, r"num_classes is 5"),
    (["--data-dir", "nowhere", "--labels-per-class", "1"], 1, r"data_dir 'nowhere' does not exist"),
    (["--dataset", "wds/x", "--labels-per-class", "1"], 1, r"wds/x"),
    (["--resume", "nowhere/last.pth.tar"], 1, r"no checkpoint at nowhere/last\.pth\.tar"),
    (["--model", "vim_nonesuch"], 1, r"vim_nonesuch"),
    (["--model", "test_vit", "--img-size", "32"], 1, r"ssmixup_c"),
    (["--amp"], 1, r"--amp-dtype float16 needs a GPU"),
    (["--mixup", "0.2", "-b", "15"], 2, r"--batch-size must be even, got 15"),
    (["--pseudo-mixup", "none", "--ssmixup-nu", "0.5"], 2, r"--ssmixup-nu is read only with --pseudo-mixup ss"),
    (["--ssl-method", "fixmatch", "--lyap-gamma", "5"], 2, r"--lyap-gamma is read only with --ssl-method lyapema"),
]


@pytest.mark.parametrize(("flags", "code", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_line_before_training(flags, code, message, tmp_path, capsys):
    import re

    with pytest.raises(SystemExit) as error:
        train_ssl.main(["--output", str(tmp_path), *flags])
    said = capsys.readouterr().err + (error.value.code if isinstance(error.value.code, str) else "")
    assert (2 if error.value.code == 2 else 1) == code
    assert re.search(message, said), said
    assert len([line for line in said.splitlines() if "error" in line]) == 1
    assert not list(tmp_path.glob("*/last.pth.tar"))


def test_config_file_sets_defaults_and_refuses_unknown_keys(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(
        yaml.safe_dump({"lr": "3e-4", "labels_per_class": 2, "dataset": "embedded/digits", "scale": [0.5, 1.0]})
    )
    args = train_ssl.parse_args(["-c", str(path), "--labels-per-class", "3"])
    assert (args.lr, args.labels_per_class, args.scale) == (3e-4, 3, [0.5, 1.0])
    for content, message in (
        ({"label_per_class": 2}, "unknown key 'label_per_class' (did you mean labels_per_class?)"),
        ({"lr": "fast"}, "lr: fast is not a finite number >= 0"),
        ({"amp": "yes please"}, "amp: wanted true or false"),
        ({"scale": 0.5}, "scale: wanted a list of 2 values"),
        ({"ssl_method": "magic"}, "ssl_method: 'magic' is not one of"),
    ):
        path.write_text(yaml.safe_dump(content))
        with pytest.raises(SystemExit):
            train_ssl.parse_args(["-c", str(path)])
        assert message in capsys.readouterr().err


def test_resume_finds_its_folder_and_split_wherever_the_run_was_put(whole, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(whole[0], folder)
    results = train_ssl.main(
        ["-c", str(folder / "args.yaml"), "--experiment", "", "--resume", str(folder / "last.pth.tar")]
    )
    assert results["updates"] == 6
    assert results["teacher"]["top1"] == whole[1]["teacher"]["top1"]
    with pytest.raises(SystemExit, match=r"not a checkpoint of this run \(semivim_pico\)"):
        run(tmp_path / "x", "--model", "semivim_pico", "--resume", folder / "last.pth.tar")


def test_lists_name_images_of_the_dataset_also_beside_an_unlabelled_folder(image_folder, tmp_path):
    path = tmp_path / "lt.txt"
    path.write_text("train/cat/1.png 0\ntrain/dog/2.png 1\n")
    flags = [
        "--data-dir",
        str(image_folder),
        "--labeled-list",
        str(path),
        "--unlabeled-dir",
        str(image_folder / "more"),
    ]
    source, _, split = train_ssl.open_data(train_ssl.parse_args(flags), None)
    assert [source.describe(i).split("train/")[1] for i in split.labelled] == ["cat/1.png", "dog/2.png"]
    assert split.labels[split.labelled].tolist() == [0, 1]
    assert len(split.unlabelled) == 14 + len(list((image_folder / "more" / "deep").iterdir()))


def test_validation_images_must_be_others_of_the_same_classes(image_folder, tmp_path):
    flags = ["--data-dir", image_folder, "--labels-per-class", 2, "-j", 0]
    with pytest.raises(SystemExit, match="split 'nonesuch' has no folder of its own"):
        run(tmp_path / "run", *flags, "--val-split", "nonesuch")
    (image_folder / "odd" / "cat").mkdir(parents=True)
    shutil.copy(image_folder / "validation" / "cat" / "0.png", image_folder / "odd" / "cat")
    with pytest.raises(SystemExit, match="training has 2 classes and validation 1, the first that differs is 'dog'"):
        run(tmp_path / "run", *flags, "--val-split", "odd")


@pytest.mark.slow
def test_two_processes_keep_equal_students_and_split_the_batch(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "train_ssl.py",
        *TINY,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, "--output", str(tmp_path), "--experiment", "ddp", "-b", "2", "--device", "cpu"],
        cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=300,
    )  # fmt: skip
    results = json.loads((tmp_path / "ddp" / "metrics.json").read_text())
    assert results["updates"] == 6
    confusion = torch.tensor(results["teacher"]["confusion"])
    assert confusion.sum() == 500  # every validation image once, over both processes


RANKS = """
import sys, torch, torch.distributed as dist, train_ssl
from semivim.task.semi_supervised import SemiSupervisedTask
update = SemiSupervisedTask.update_ema
def checked(self, step=None):
    update(self, step)
    for name, module in (("student", self.trainable_module), ("teacher", self.trainable_module_ema)):
        mine = torch.cat([p.detach().flatten() for p in module.parameters()])
        first = mine.clone()
        dist.broadcast(first, 0)
        assert torch.equal(mine, first), f"{name} of rank {dist.get_rank()} differs at step {step}"
SemiSupervisedTask.update_ema = checked
train_ssl.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_ranks_keep_one_student_and_one_teacher(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(tmp_path / "ranks.py"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    flags = [*TINY, "--epochs", "1", "--output", str(tmp_path), "--experiment", "ddp", "-b", "2", "--device", "cpu"]
    done = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
