import csv
import gc
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import semivim  # noqa: F401
import train_arm
import train_ssl
from semivim.hub.hub import publish
from semivim.layers import resample_pos_embed
from semivim.utils.user_error import UserError
from tests import training
from tests.arm_training import TINY, run
from tests.training import ROOT, refused

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An unbroken run of six updates in two epochs."""
    folder = tmp_path_factory.mktemp("arm") / "whole"
    return folder, run(folder)


def test_run_folder_holds_everything(whole):
    folder, results = whole
    names = {path.name for path in folder.iterdir()}
    wanted = {"args.yaml", "summary.csv", "metrics.jsonl", "metrics.json", "curves.png", "predictions.png"}
    assert wanted | {"last.pth.tar", "model_best.pth.tar", "model.safetensors", "config.json", "best.json"} <= names
    assert not [name for name in names if "tmp" in name]
    stored = json.loads((folder / "metrics.json").read_text())
    assert stored == results
    assert stored["pretraining"]["directions"] == "forward"
    assert stored["pretraining"]["images"] > 1000
    assert stored["pretraining"]["loss_of_zero"] == pytest.approx(191 / 192, abs=1e-3)
    assert stored["best"]["loss"] == min(float(row["eval_loss"]) for row in rows(folder))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["update"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["epoch"] for r in records if "held_out_loss" in r] == [0, 1]
    with Image.open(folder / "predictions.png") as picture:
        assert picture.size[0] > 500
        assert len(set(picture.convert("L").tobytes())) > 50
    assert train_arm.parse_args(["-c", str(folder / "args.yaml")]).model == "test_vim"


def rows(folder):
    return list(csv.DictReader((folder / "summary.csv").read_text().splitlines()))


def test_learning_rate_is_arms(tmp_path, monkeypatch):
    """0 at the first update, the base rate times images / 256 after the warm-up, the least at the end; per update."""
    rates, step = [], train_arm.optimizer_step

    def spy(task, batches, forward, optimizer, **options):
        rates.append(train_arm.mean_lr(optimizer))
        return step(task, batches, forward, optimizer, **options)

    monkeypatch.setattr(train_arm, "optimizer_step", spy)
    flags = ["--warmup-epochs", 1, "--epochs", 2, "--train-batches-per-epoch", 4, "--grad-accum-steps", 2]
    run(tmp_path / "run", *flags, "--lr-base", 0.03, "--min-lr", 1e-5, "--val-interval", 9)
    base = 0.03 * 4 * 2 / 256
    assert len(rates) == 12  # the warm-up comes before the epochs
    assert rates[:5] == pytest.approx([base * share for share in (0, 0.25, 0.5, 0.75, 1)])
    assert rates[8] == pytest.approx(1e-5 + (base - 1e-5) * (1 + math.cos(math.pi / 2)) / 2)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [r["lr"] for r in records if "lr" in r]  # after each update
    assert logged[:-1] == rates[1:] and logged[-1] == pytest.approx(1e-5)


def test_recipe_is_arms_and_its_groups_decay_matrices_only():
    args = train_arm.parse_args(["--data-dir", "x"])
    assert (args.opt, args.opt_betas, args.weight_decay, args.clip_grad) == ("adamw", [0.9, 0.95], 0.05, 3.0)
    assert (args.img_size, args.cluster, args.epochs + args.warmup_epochs) == (192, 4, 300)
    assert (args.scale, args.train_interpolation, args.drop_path) == ([0.2, 1.0], "bicubic", None)
    model = train_arm.create_arm(train_arm.parse_args(TINY))
    optimizer, *_ = train_arm.create_optimizer(args, model, 10, 2048)
    assert args.lr == pytest.approx(1.2e-3)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert groups.keys() == {0.0, 0.05}
    prefix = "backbone.blocks.0.mixer."
    assert {f"{prefix}{name}" for name in ("A_log", "conv1d.weight", "dt_proj.weight")} <= groups[0.05]
    assert "decoder.token" in groups[0.05]
    assert {f"{prefix}{name}" for name in ("D", "dt_proj.bias", "conv1d.bias")} <= groups[0.0]
    assert groups[0.0] | groups[0.05] == {name for name, p in model.named_parameters() if p.requires_grad}


def test_gradients_are_clipped(tmp_path, monkeypatch):
    clips, step = [], train_arm.optimizer_step

    def spy(*args, clip, **options):
        clips.append(clip)
        return step(*args, clip=clip, **options)

    monkeypatch.setattr(train_arm, "optimizer_step", spy)
    run(tmp_path / "run", "--epochs", 1)
    assert clips == [{"clip_grad": 3.0, "clip_mode": "norm"}] * 3


# Export


def test_export_holds_all_but_the_head(whole):
    folder, _ = whole
    weights = load_file(folder / "model.safetensors")
    classifier = timm.create_model("test_vim", num_classes=5)
    assert set(classifier.state_dict()) - set(weights) == {"head.weight", "head.bias"}
    assert set(weights) <= set(classifier.state_dict())
    for block in range(4):
        prefix = f"blocks.{block}.mixer."
        for forward, backward in (("x_proj.weight", "x_proj_b.weight"), ("A_log", "A_b_log"), ("D", "D_b")):
            assert torch.equal(weights[prefix + forward], weights[prefix + backward])


def test_both_directions_train_apart(tmp_path):
    run(tmp_path / "run", "--directions", "both")
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert not torch.equal(weights["blocks.1.mixer.x_proj.weight"], weights["blocks.1.mixer.x_proj_b.weight"])


def test_export_loads_into_timm_with_and_without_classes(whole):
    folder, _ = whole
    weights = load_file(folder / "model.safetensors")
    file, images = str(folder / "model.safetensors"), torch.randn(2, 3, 32, 32)
    models = [
        timm.create_model("test_vim", num_classes=5, checkpoint_path=file),
        timm.create_model("test_vim", num_classes=0, checkpoint_path=file),
        timm.create_model(f"local-dir:{folder}", pretrained=True),
        timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=5),
    ]
    features = [model.eval().forward_features(images) for model in models]
    assert all(torch.equal(other, features[0]) for other in features[1:])
    for model in models:
        assert torch.equal(model.blocks[3].mixer.in_proj.weight, weights["blocks.3.mixer.in_proj.weight"])
    assert [model.num_classes for model in models] == [5, 0, 0, 5]


def test_position_embedding_is_resized_around_the_class_token(whole):
    folder, _ = whole
    pos_embed = load_file(folder / "model.safetensors")["pos_embed"]
    wanted = resample_pos_embed(pos_embed, (6, 6), (4, 4))
    for model in (
        timm.create_model("test_vim", num_classes=5, img_size=48, checkpoint_path=str(folder / "model.safetensors")),
        timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=48),
    ):
        assert torch.equal(model.pos_embed, wanted)
    assert torch.equal(wanted[0, 18], pos_embed[0, 8])  # the class token's, in the middle of both


def test_train_ssl_goes_on_from_the_export(whole, tmp_path):
    folder, _ = whole
    flags = ["--initial-checkpoint", folder / "model.safetensors", "--img-size", "48", "--epochs", "1"]
    flags += ["--in-chans", "3", "--mean", "0.5", "--std", "0.5"]
    results = training.run(tmp_path / "run", *flags, "--gp", "avg")
    assert results["updates"] == 3
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = next(r["loss_labelled"] for r in records if "loss_labelled" in r)
    assert 1 < first < 6  # ln 10 = 2.3 where the logits keep their scale
    torch.manual_seed(0)
    file, images = str(folder / "model.safetensors"), torch.randn(8, 3, 32, 32)
    pretrained, scratch = (
        timm.create_model("test_vim", num_classes=10, checkpoint_path=path).eval()(images).std() for path in (file, "")
    )
    assert 0.2 < pretrained / scratch < 5  # the copied directions do not add up
    args = train_ssl.parse_args(["-c", str(tmp_path / "run" / "args.yaml")])
    model = train_ssl.create_model(args, 10, **train_ssl.classifier_kwargs(args), **train_ssl.ssmixup_kwargs(args))
    assert torch.equal(model.cls_token, load_file(folder / "model.safetensors")["cls_token"])


def test_run_can_be_published(whole):
    folder, results = whole
    publication = publish(folder, "org/arm", dry_run=True)
    assert f"| published, epoch {results['best']['epoch']} | {results['best']['loss']:.4f} |" in publication.card


# Data


@pytest.fixture
def images(tmp_path):
    """Class folders of four training images and two to validate, and a heap of three images without classes."""
    for index in range(9):
        name = ("train/cat", "train/dog", "train/cat", "train/dog", "validation/cat", "validation/dog")
        folder = tmp_path / (name[index] if index < 6 else "heap/deep")
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 40), 20 + 10 * index).convert("RGB").save(folder / f"{index}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "count"),
    [
        (["--data-dir", "."], 4),
        (["--data-dir", ".", "--unlabeled-dir", "heap"], 7),
        (["--unlabeled-dir", "heap"], 2),
    ],
    ids=["classes", "classes and heap", "heap"],
)
def test_images_need_no_labels(flags, count, images, tmp_path, monkeypatch):
    monkeypatch.chdir(images)
    extra = ["--lr", "1e-3", "--train-batches-per-epoch", "1", "--epochs", "1", "--workers", "0"]
    results = run(tmp_path / "run", *flags, *extra)
    assert results["pretraining"]["images"] == count
    assert results["pretraining"]["loss"] > 0


def fashion_mnist(root):
    """Raw files of four training and two validation images, as torchvision keeps them."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for stem, count in (("train", 4), ("t10k", 2)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = struct.pack(">IIII", 2051, count, 28, 28)
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + bytes(count))
    return ["--dataset", "torch/fashion_mnist", "--data-dir", root]


def image_folder(root):
    return ["--dataset", "torch/image_folder", "--data-dir", root]


def hugging_face(root):
    """A data set without a column of labels."""
    datasets = pytest.importorskip("datasets")
    for split in ("train", "validation"):
        files = [str(path) for path in sorted((root / split).rglob("*.png"))]
        table = datasets.Dataset.from_dict({"image": files}, features=datasets.Features({"image": datasets.Image()}))
        table.to_parquet(root / "hub" / f"{split}.parquet")
    return ["--dataset", f"hfds/{root / 'hub'}", "--data-dir", root / "cache"]


def shards(root):
    """Shards without labels."""
    for split in ("train", "validation"):
        with tarfile.open(root / f"x-{split}-0.tar", "w") as shard:
            for path in sorted((root / split).rglob("*.png")):
                shard.add(path, arcname=path.name)
    return ["--dataset", "wds/x", "--data-dir", root]


def tar_file(root):
    """A file without splits: the first image is held out."""
    with tarfile.open(root / "all.tar", "w") as archive:
        archive.add(root / "train", arcname=".")
    return ["--data-dir", root / "all.tar"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")  # of datasets
@pytest.mark.parametrize("write", [fashion_mnist, image_folder, hugging_face, shards, tar_file])
def test_every_format_of_train_ssl_is_read(write, images, tmp_path, monkeypatch):
    if write is hugging_face:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    shutil.rmtree(images / "heap")
    flags = ["--train-batches-per-epoch", "1", "--epochs", "1", "--workers", "0"]
    results = run(tmp_path / "run", *write(images), *flags)
    assert results["pretraining"]["images"] == (3 if write is tar_file else 4)
    assert 0 < results["pretraining"]["loss"] < 3 and results["unreadable_images"] == {}
    gc.collect()  # datasets leaves its table open


def test_images_to_train_on_are_not_held_out_too(images, monkeypatch):
    monkeypatch.chdir(images)
    for extra in ([], ["--unlabeled-dir", "heap"]):
        with pytest.raises(UserError, match="images to train on are validation images too: split 'train' shares"):
            train_arm.open_data(train_arm.parse_args(["--data-dir", ".", "--val-split", "train", *extra]))
    with tarfile.open("one.tar", "w") as archive:
        archive.add("heap/deep/6.png", arcname="6.png")
    with pytest.raises(UserError, match=r"--data-dir one.tar holds one image, wanted one more to evaluate on"):
        train_arm.open_data(train_arm.parse_args(["--data-dir", "one.tar"]))
    source, train, _, held_out = train_arm.open_data(
        train_arm.parse_args(["--data-dir", "one.tar", "--unlabeled-dir", "heap"])
    )
    assert (len(source), train.tolist(), held_out.tolist()) == (4, [1, 2, 3], [0])


def test_class_folders_without_a_validation_split_are_sent_to_a_flag_of_this_script(images):
    with pytest.raises(UserError, match=r"where its folders are classes, .* train_arm\.py --unlabeled-dir holds"):
        train_arm.open_data(train_arm.parse_args(["--data-dir", str(images / "train")]))
    _, train, _, held_out = train_arm.open_data(train_arm.parse_args(["--unlabeled-dir", str(images / "train")]))
    assert (len(train), len(held_out)) == (3, 1)


def test_a_heap_is_read_by_the_flags_of_pixels(images, monkeypatch):
    monkeypatch.chdir(images)
    source, train, _, held_out = train_arm.open_data(
        train_arm.parse_args(["--unlabeled-dir", "heap", "--alpha-background", "black", "--max-value", "4095"])
    )
    assert (source.rules.alpha_background, source.rules.max_value) == ((0, 0, 0), 4095)
    assert (train.tolist(), held_out.tolist()) == ([1, 2], [0])


def test_unreadable_images_are_skipped_and_counted(images, tmp_path, monkeypatch):
    monkeypatch.chdir(images)
    (images / "train" / "cat" / "0.png").write_bytes(b"no image")
    results = run(tmp_path / "run", "--data-dir", ".", "--workers", "0")
    assert list(results["unreadable_images"]) == ["./train/cat/0.png"]


def test_unreadable_held_out_images_of_a_heap_are_left_out(images, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(images)
    for index in range(201):  # the first, the 101st and the 201st are held out
        (images / "heap" / f"{index:03}.png").write_bytes((images / "heap" / "deep" / "6.png").read_bytes())
    (images / "heap" / "100.png").write_bytes(b"no image")
    flags = ["--unlabeled-dir", "heap", "--workers", "0", "--epochs", "1", "-vb", "1"]
    results = run(tmp_path / "run", *flags)
    assert 0 < results["pretraining"]["loss"] < 10
    assert "left out of the evaluation: heap/100.png is unreadable" in caplog.text
    for name in ("000", "100", "200"):
        (images / "heap" / f"{name}.png").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        run(tmp_path / "none", *flags)


BAD = [
    (["--model", "test_vit"], r"backbone is a VisionTransformer, wanted a Vim"),
    (["--img-size", "56", "--cluster", "4"], r"cluster is 4, wanted a divisor of the grid 7 x 7"),
    (["--dec-dim", "100"], r"channels are 100, wanted a multiple of 64"),
    (["--unlabeled-dir", "no-such-folder"], r"no-such-folder"),
    (["--model", "vim_nonesuch"], r"vim_nonesuch"),
    (["--amp"], r"--amp-dtype float16 needs a GPU"),
    (["--directions", "both", "-b", "1"], r"--batch-size must be 2 or more, got 1"),
    (["--sched", "plateau", "--sched-on-updates"], r"plateau steps every epoch"),
    (["--tune-scope", "head"], r"unrecognized arguments: --tune-scope head"),
    (["--num-classes", "5"], r"unrecognized arguments: --num-classes 5"),
    (["--resume", "nowhere/last.pth.tar"], r"no checkpoint at nowhere/last\.pth\.tar"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_input_is_one_line_before_training(flags, message, tmp_path, capsys):
    with refused(message, capsys):
        run(tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_demo_values_make_way_for_what_is_given():
    assert train_arm.parse_args([]).lr == train_arm.DEMO["lr"]
    assert train_arm.parse_args(["--lr-base", "1e-3"]).lr is None
    args = train_arm.parse_args(["--input-size", "3", "64", "48"])
    assert args.img_size is None and args.cluster == 2
    assert train_arm.parse_args(["--data-dir", "x", "--input-size", "3", "64", "48"]).img_size is None


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
def test_plateau_waits_for_a_falling_loss(tmp_path, monkeypatch):
    losses = iter([1.0, 0.9, 0.8, 0.7, 0.7, 0.7])
    monkeypatch.setattr(train_arm, "held_out_loss", lambda *_: {"loss": next(losses), "loss_of_zero": 1.0})
    flags = ["--sched", "plateau", "--patience-epochs", 1, "--decay-rate", 0.5, "--lr", 0.01, "--epochs", 6]
    run(tmp_path / "run", *flags, "--train-batches-per-epoch", 1)
    assert [float(row["lr"]) for row in rows(tmp_path / "run")] == pytest.approx([0.01] * 5 + [0.005])


def test_bfloat16_runs(tmp_path):
    assert run(tmp_path / "run", "--amp", "--amp-dtype", "bfloat16", "--epochs", 1)["pretraining"]["loss"] < 2


RANKS = """
import json, pathlib, sys, torch.distributed as dist, train_arm
from tests.ranks import assert_same_on_all_ranks

step, seen, losses = train_arm.optimizer_step, [], []

def checked_step(task, batches, *args, **options):
    seen.append(batches[0][0].views[0].sum().item())
    result = step(task, batches, *args, **options)
    losses.append(result.figures["loss"].item())
    assert_same_on_all_ranks(task.model)
    return result

destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None
train_arm.optimizer_step = checked_step
results = train_arm.main(sys.argv[1:])
parts = [None] * dist.get_world_size()
dist.all_gather_object(parts, (seen, results["pretraining"]["loss"], losses))
assert not set(parts[0][0]) & set(parts[1][0]), "ranks train on the same images"
assert parts[0][1] == parts[1][1], "ranks evaluate apart"
if dist.get_rank() == 0:
    pathlib.Path("losses.json").write_text(json.dumps([parts[0][2], parts[1][2]]))
destroy()
"""


def test_two_processes_train_one_model(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    flags = [*TINY, "--output", str(tmp_path), "--experiment", "run", "--device", "cpu", "--directions", "both"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*launcher, str(tmp_path / "ranks.py"), *flags, "--epochs", "1", "--lr-base", "0.03"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["updates"] == 3
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = zip(*json.loads((tmp_path / "losses.json").read_text()), strict=True)
    assert [r["loss"] for r in records if "loss" in r] == pytest.approx([sum(pair) / 2 for pair in losses])
    base = 0.03 * 4 * 2 / 256  # of the images of both processes
    assert records[0]["lr"] == pytest.approx(base * (1 + math.cos(math.pi / 3)) / 2)
