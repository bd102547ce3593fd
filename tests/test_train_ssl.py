import csv
import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
import types
from functools import partial

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import semivim
import train_ssl
from semivim.runs import open_run
from semivim.runs.optimizer_step import SkippedSteps
from tests.training import PLAIN, ROOT, TINY, refused, run, states


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
    assert stored["split"]["num_labelled"] == 78
    rules = {"alpha_background": [255, 255, 255], "max_value": None}
    assert json.loads((folder / "config.json").read_text())["semivim_pixel_rules"] == rules
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


def test_best_model_loads_into_timm(whole):
    folder, results = whole
    best = states(folder, "model_best.pth.tar")[results["best"]["model"] == "teacher"]
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


def test_finished_folder_is_not_overwritten(whole, capsys):
    folder, _ = whole
    before = (folder / "last.pth.tar").read_bytes()
    with refused("holds a run already", capsys):
        run(folder)
    assert (folder / "last.pth.tar").read_bytes() == before


def test_epochs_go_to_weights_and_biases_too(tmp_path, monkeypatch, capsys):
    rows = []

    class Wandb:
        init = staticmethod(lambda **kwargs: rows.append(kwargs))
        log = staticmethod(rows.append)

    module = types.ModuleType("wandb")
    module.init, module.__spec__ = Wandb.init, importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr("timm.utils.summary.wandb", Wandb, raising=False)
    flags = ["--epochs", 1, "--ssl-method", "supervised", "--threshold", 0.7]
    run(tmp_path / "run", *flags, "--log-wandb", "--wandb-project", "p")
    assert rows[0]["project"] == "p"
    assert rows[1]["eval_top1"] >= 0.0
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused("--log-wandb: wandb is not installed", capsys):
        run(tmp_path / "other", "--log-wandb")


@pytest.mark.parametrize(
    "flags",
    [
        ["--ssl-method", "supervised", "--threshold", "0.5", "--lyap-gamma", "2", "--pseudo-mixup", "ss"],
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
            "--channels-last",
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


@pytest.mark.parametrize("better", ["student", "teacher"])
def test_the_better_of_student_and_teacher_is_saved_and_named(better, tmp_path, monkeypatch, capsys):
    evaluate, calls = train_ssl.evaluate, []

    def judged(model, *args, **kwargs):
        calls.append("teacher" if len(calls) % 2 else "student")
        top1 = 90.0 if calls[-1] == better else 80.0
        return evaluate(model, *args, **kwargs) | {"balanced_acc": top1, "top1": 170.0 - top1}

    monkeypatch.setattr(train_ssl, "evaluate", judged)
    folder = tmp_path / "run"
    results = run(
        folder, "--epochs", 1, "--ssl-method", "fixmatch", "--pseudo-mixup", "none", "--eval-metric", "balanced_acc"
    )
    weights = load_file(folder / "model.safetensors")
    saved = states(folder)[better == "teacher"]
    other = states(folder)[better == "student"]
    assert all(torch.equal(saved[key], weights[key]) for key in weights)
    assert not all(torch.equal(other[key], weights[key]) for key in weights)
    assert (results["best"]["model"], results["best"]["balanced_acc"]) == (better, 90.0)
    said = capsys.readouterr().out
    assert f"best so far: {better} of epoch 0, balanced_acc 90.00" in said
    assert f"model.safetensors (best: {better} of epoch 0)" in said
    assert torch.load(folder / "model_best.pth.tar", weights_only=False)["metric"] == 90.0


@pytest.mark.parametrize(("threshold", "fault"), [(0.99999, "no unlabelled image was kept"), (0.05, None)])
def test_unlabelled_images_that_taught_nothing_are_told_at_once_and_at_the_end(threshold, fault, tmp_path, capsys):
    results = run(tmp_path / "run", "--threshold", threshold)
    said = capsys.readouterr().out
    assert "unlabelled images: 48 seen, " in said
    assert said.count("no unlabelled image was kept") == (2 if fault else 0)  # after the first epoch, under the table
    assert (fault or "None") in str(results["pseudo_labels"]["fault"])
    assert results["pseudo_labels"]["seen"] == 48


def test_classes_are_grouped_by_all_their_training_images(tmp_path, monkeypatch):
    seen, evaluate = [], train_ssl.evaluate

    def recorded(*args, train_counts, **kwargs):
        seen.append(train_counts)
        return evaluate(*args, train_counts=train_counts, **kwargs)

    monkeypatch.setattr(train_ssl, "evaluate", recorded)
    imbalance = ["--imb-n1", 8, "--imb-factor-l", 4, "--imb-m1", 80, "--imb-factor-u", -4]
    flags = ["--epochs", 1, "--train-batches-per-epoch", 1, "--eval-metric", "balanced_acc", *imbalance]
    results = run(tmp_path / "run", *flags)
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["teacher_balanced_acc"] == results["teacher"]["balanced_acc"]
    assert record["student_top1"] == results["student"]["top1"]
    assert (seen[0][0], seen[0][9]) == (8 + 20, 2 + 80)
    assert sum(seen[0]) == results["split"]["num_labelled"] + results["split"]["num_unlabelled"]
    assert results["teacher"]["many"] == pytest.approx(sum(results["teacher"]["per_class_recall"][7:]) / 3)


def test_mixup_ends_at_its_epoch_and_the_rate_logged_is_the_mean(tmp_path, monkeypatch):
    enabled, call = [], train_ssl.Mixup.__call__

    def recorded(self, *args):
        enabled.append(self.mixup_enabled)
        return call(self, *args)

    monkeypatch.setattr(train_ssl.Mixup, "__call__", recorded)
    flags = ["--train-batches-per-epoch", 1, "--layer-decay", 0.5, "--sched", "constant"]
    run(tmp_path / "run", "--mixup", 0.2, "--mixup-off-epoch", 1, *flags)
    assert enabled == [True, False]
    checkpoint = torch.load(tmp_path / "run" / "last.pth.tar", weights_only=False)
    rates = [group["lr"] for group in checkpoint["optimizer"]["param_groups"]]
    assert max(rates) > 2 * min(rates)
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    (row, *_) = csv.DictReader((tmp_path / "run" / "summary.csv").read_text().splitlines())
    assert record["lr"] == float(row["lr"]) == pytest.approx(sum(rates) / len(rates))


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


def test_broken_validation_image_is_an_error_that_names_it(image_folder, tmp_path, capsys):
    broken = image_folder / "validation" / "cat" / "9.png"
    broken.write_bytes(b"not an image")
    with refused(r"9\.png", capsys):
        run(tmp_path / "run", "--data-dir", image_folder, "--labels-per-class", 2, "-j", 0)
    broken.unlink()


def test_gradients_that_stay_infinite_stop_the_run_and_leave_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(open_run, "SkippedSteps", partial(SkippedSteps, limit=2))
    folder = tmp_path / "run"
    with refused(r"not finite in 3 steps in a row.*last\.pth\.tar", capsys):
        run(
            folder, "--lr", "1e38", "--opt", "sgd", "--sched", "constant", "--epochs", 5, "--train-batches-per-epoch", 1
        )
    assert all(value.isfinite().all() for value in states(folder)[1].values())


BAD = [
    (["--labels-per-clas", "4"], r"did you mean --labels-per-class"),
    (["--batch-size", "0"], r"argument -b/--batch-size: 0 is not a whole number in "),
    (["--label-fraction", "0.1", "--labels-per-class", "4"], r"got --label-fraction and --labels-per-class"),
    (["--model-kwargs", "depth=foo"], r"--model semivim_pico --model-kwargs \{'depth': 'foo'\}: "),
    (["--initial-checkpoint", "nowhere.pth"], r"--initial-checkpoint: nowhere\.pth is not a readable torch file"),
    (["--opt-kwargs", "foo=1"], r"--opt adamw, --opt-kwargs, .*foo"),
    (["--sched", "wsd", "--decay-epochs", "50"], r"--sched wsd: .*decay_epochs"),
    (["--device-modules", "semivim", "--device", "nonsense"], r"--device nonsense: "),
    (["--start-epoch", "20"], r"--start-epoch is 20, wanted less than the 20 epochs"),
    (["--ssl-method", "magic"], r"--ssl-method: invalid choice: 'magic'"),
    (["--resume", "auto"], r"--resume auto: needs --experiment"),
    (["--labels-per-class", "1000"], r"no unlabelled image is left"),
    (["--num-classes", "5"], r"--num-classes is 5"),
    (["--data-dir", "nowhere", "--labels-per-class", "1"], r"--data-dir 'nowhere' does not exist"),
    (["--dataset", "wds/x", "--labels-per-class", "1"], r"wds/x"),
    (["--resume", "nowhere/last.pth.tar"], r"no checkpoint at nowhere/last\.pth\.tar"),
    (["--model", "vim_nonesuch"], r"vim_nonesuch"),
    (["--model", "test_vit", "--img-size", "32", "--pseudo-mixup", "ss"], r"SSMixup needs a Vim"),
    (["--model", "test_dyvm", "--img-size", "32", "--pseudo-mixup", "none"], "train it by benchmarks/train_dyvm.py"),
    (["--amp"], r"--amp-dtype float16 needs a GPU"),
    (["--mixup", "0.2", "-b", "15"], r"--batch-size must be even, got 15"),
    (["--pseudo-mixup", "none", "--ssmixup-nu", "0.5"], r"--ssmixup-nu is read only with --pseudo-mixup ss"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_line_before_training(flags, message, tmp_path, capsys):
    with refused(message, capsys):
        train_ssl.main(["--output", str(tmp_path), *flags])
    assert not list(tmp_path.glob("*/last.pth.tar"))


def test_a_bug_keeps_its_traceback_and_debug_shows_that_of_a_mistake(tmp_path, monkeypatch, capsys):
    def broken(self, *args, **kwargs):
        return self.typo

    folder = tmp_path / "run"
    for method in ("__init__", "forward_features"):
        with monkeypatch.context() as patch, pytest.raises(AttributeError, match="has no attribute 'typo'"):
            patch.setattr(semivim.Vim, method, broken)
            run(folder)
    with pytest.raises(SystemExit) as stop:
        train_ssl.main(["--output", str(tmp_path), "--model", "vim_nonesuch", "--debug"])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert "Traceback (most recent call last):" in lines
    assert lines[-1].startswith("train_ssl.py: error: --model vim_nonesuch: ")


def test_folder_that_cannot_be_written_is_one_line(capsys):
    with refused(r"^train_ssl\.py: error: --output: cannot write to /proc/x/", capsys):
        train_ssl.main([*TINY, "--output", "/proc/x"])


def test_demo_values_make_way_for_what_is_given():
    def demo(*flags):
        return train_ssl.parse_args(list(flags))

    def split(args):
        return args.imb_n1, args.imb_factor_l, args.imb_m1, args.imb_factor_u, args.debias_pseudo, args.posthoc_debias

    assert split(demo()) == (20, 10.0, 100, 10.0, 1.0, "unlabeled")
    assert split(demo("--imb-n1", "8")) == (8, 10.0, 100, 10.0, 1.0, "unlabeled")
    for flags in (["--label-fraction", "0.1"], ["--labels-per-class", "4"], ["--labeled-list", "a.csv"]):
        assert split(demo(*flags)) == (None, 1.0, None, 1.0, 0.0, "none")  # the rules are the long tail's
    assert demo("--labels-per-class", "4", "--debias-pseudo", "0.5").debias_pseudo == 0.5
    assert demo("--pseudo-prior", "estimated", "--logit-adjust-tau", "1").debias_pseudo == 0.0
    assert (demo().lr, demo().sched_on_updates) == (2e-3, True)
    assert demo("--lr-base", "0.01").lr is None
    assert not demo("--sched", "plateau").sched_on_updates


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


def test_resume_finds_its_folder_and_split_wherever_the_run_was_put(whole, tmp_path, capsys):
    folder = tmp_path / "moved"
    shutil.copytree(whole[0], folder)
    results = train_ssl.main(
        ["-c", str(folder / "args.yaml"), "--experiment", "", "--resume", str(folder / "last.pth.tar")]
    )
    assert results["updates"] == 6
    assert results["teacher"]["top1"] == whole[1]["teacher"]["top1"]
    with refused(r"last\.pth\.tar: not a checkpoint of this run", capsys):
        run(tmp_path / "x", "--model", "semivim_pico", "--resume", folder / "last.pth.tar")


def test_lists_name_images_of_the_dataset_also_beside_an_unlabelled_folder(image_folder, tmp_path):
    path = tmp_path / "lt.txt"
    path.write_text("train/cat/1.png 0\ntrain/dog/2.png 1\n")
    flags = ["--data-dir", str(image_folder), "--labeled-list", str(path)]
    flags += ["--unlabeled-dir", str(image_folder / "more")]
    source, _, split = train_ssl.open_data(train_ssl.parse_args(flags), None)
    assert [source.describe(i).split("train/")[1] for i in split.labelled] == ["cat/1.png", "dog/2.png"]
    assert split.labels[split.labelled].tolist() == [0, 1]
    assert len(split.unlabelled) == 14 + len(list((image_folder / "more" / "deep").iterdir()))


def test_validation_images_must_be_others_of_the_same_classes(image_folder, tmp_path, capsys):
    flags = ["--data-dir", image_folder, "--labels-per-class", 2, "-j", 0]
    with refused("split 'nonesuch' has no folder of its own", capsys):
        run(tmp_path / "run", *flags, "--val-split", "nonesuch")
    (image_folder / "odd" / "cat").mkdir(parents=True)
    shutil.copy(image_folder / "validation" / "cat" / "0.png", image_folder / "odd" / "cat")
    with refused("training has 2 classes and validation 1, the first that differs is 'dog'", capsys):
        run(tmp_path / "run", *flags, "--val-split", "odd")


RANKS = """
import sys, torch, torch.distributed as dist, train_ssl
from semivim.data import ImageSource, UnreadableImageError
from semivim.task.semi_supervised import SemiSupervisedTask
from tests.ranks import assert_same_on_all_ranks

update, step = SemiSupervisedTask.update_ema, train_ssl.optimizer_step
read, used, broken = ImageSource.image, [], []

def of_all_ranks(mine):
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    return parts

def image(self, position):
    if len(self) > 1000:
        (broken if position % 5 == 0 else used).append(position)
        if position % 5 == 0:
            raise UnreadableImageError("broken")
    return read(self, position)

def checked_step(task, batches, *args, **options):
    assert [len(labelled.label) for labelled, _ in batches] == [2]
    first, second = of_all_ranks(torch.rand(4).tolist())
    assert first != second, "ranks draw the same random numbers"
    return step(task, batches, *args, **options)

def checked_update(self, step=None):
    update(self, step)
    assert_same_on_all_ranks(self.trainable_module)
    assert_same_on_all_ranks(self.trainable_module_ema)

destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None  # below, after the last question
ImageSource.image = image
train_ssl.optimizer_step = checked_step
SemiSupervisedTask.update_ema = checked_update
results = train_ssl.main(sys.argv[1:])
ours, theirs = of_all_ranks(used)
assert len(ours) >= 3 * (2 + 4)
unlabelled = [set(part) for part in (ours[2:6], theirs[2:6])]
assert not unlabelled[0] & unlabelled[1], "ranks see the same unlabelled images"
assert sum(results["unreadable_images"].values()) == sum(of_all_ranks(len(broken))) > max(of_all_ranks(len(broken)))
destroy()
"""


@pytest.mark.slow
def test_ranks_keep_one_student_and_one_teacher_and_share_the_work(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    flags = [*TINY, *PLAIN, "--epochs", "1", "--output", str(tmp_path), "--experiment", "ddp"]
    flags += ["-b", "2", "--device", "cpu"]
    done = subprocess.run(
        [*command, str(tmp_path / "ranks.py"), *flags, "-j", "0"],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "ddp" / "metrics.json").read_text())
    assert results["updates"] == 3
    assert results["pseudo_labels"]["seen"] == 24  # 3 updates of 4 unlabelled images on each rank
    assert torch.tensor(results["teacher"]["confusion"]).sum() == 500  # every validation image once, over both


WAITING = """
import os, time
import train_ssl, torch
torch.set_num_threads(2)
x = torch.ones(1 << 20)
x.mul_(1.0)
start = time.process_time()
for _ in range(20):
    x.mul_(1.0)
    time.sleep(0.03)
print(os.environ["OMP_WAIT_POLICY"], time.process_time() - start)
"""


@pytest.mark.parametrize("given", (None, "passive", "active"))
def test_threads_of_a_run_sleep_while_they_wait_unless_the_user_says_otherwise(given):
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    if given:
        environment["OMP_WAIT_POLICY"] = given
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WAITING], env=environment, capture_output=True, text=True, check=True
    )
    policy, busy = run.stdout.split()
    assert policy == (given or "passive")
    if policy == "passive":  # of 0.6 s, in which a spinning thread would be busy for a large part
        assert float(busy) < 0.15
