"""Training with the rules for rare classes: what a run reports and saves, how it goes on, and its stages."""

import json
import re
import shlex

import pytest
import timm
import torch

import semivim  # noqa: F401  registers the models
import train_ssl
from semivim.flags.ssl_flags import teacher_kwargs
from semivim.flags.train_flags import scaled_lr
from tests.training import ROOT, TINY, assert_same_run, refused, run, states

LONG_TAIL = [
    "--imb-n1",
    "12",
    "--imb-factor-l",
    "6",
    "--imb-m1",
    "60",
    "--imb-factor-u",
    "6",
    "--model-ema-decay",
    "0.9",
]
RULES = {
    "debias": ["--debias-pseudo", "1"],
    "adjust": ["--logit-adjust-tau", "1", "--pseudo-prior", "estimated"],
    "softmatch": ["--threshold-mode", "softmatch", "--threshold", "0.7"],
}


class KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def debiased(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "debiased"
    return folder, run(folder, *LONG_TAIL, *RULES["debias"], "--posthoc-debias", "unlabeled")


def test_report_shows_both_heads_and_the_pseudo_labels_of_each_class(debiased):
    folder, results = debiased
    stored = json.loads((folder / "metrics.json").read_text())
    assert stored["teacher_debiased"]["balanced_acc"] == results["teacher_debiased"]["balanced_acc"]
    assert {"student", "teacher", "student_debiased", "teacher_debiased"} <= set(stored)
    figures = stored["pseudo_labels"]
    assert len(figures["recall"]) == len(figures["precision"]) == 10
    assert all(value is None or 0 <= value <= 100 for value in figures["recall"] + figures["precision"])
    assert {"kept_share", "kept_share_many", "kept_share_medium", "pseudo_entropy", "prior_kl"} <= set(figures["means"])
    assert all(value >= 0 for value in figures["means"].values())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [r for r in records if "loss_labelled" in r]
    wanted = {"kept_share_many", "kept_share_medium", "pseudo_entropy", "prior_kl", "prior_min", "prior_max"}
    assert wanted <= set.union(*(set(r) for r in logged))
    assert logged[-1]["prior_min"] < 0.1 < logged[-1]["prior_max"]
    shares = torch.load(folder / "last.pth.tar", weights_only=False)["task_state"]["pseudo_labels"]["prior"]
    (evaluated,) = [r for r in records if r.get("epoch") == 1]
    ends = {evaluated["prior_min_class"], evaluated["prior_max_class"]}
    assert ends == {stored["class_names"][int(label)] for label in (shares.argmin(), shares.argmax())}


def test_saved_model_is_the_debiased_one(debiased):
    folder, results = debiased
    config = json.loads((folder / "config.json").read_text())
    assert config["logit_adjustment"] == {"by": "unlabeled", "tau": 1.0}
    saved = timm.create_model(f"local-dir:{folder}", pretrained=True)
    best = results["best"]["epoch"]
    if best == 1:  # the weights of the last epoch are in its checkpoint
        _, teacher = states(folder)
        assert not torch.equal(saved.head.bias, teacher["head.bias"])
        assert torch.equal(saved.head.weight, teacher["head.weight"])


def test_prior_is_not_removed_again_from_a_debiased_model(debiased, tmp_path, capsys):
    folder, _ = debiased
    with refused("wanted a plain one, such as that of last.pth.tar beside it", capsys):
        run(
            tmp_path / "again",
            *LONG_TAIL,
            "--initial-checkpoint",
            folder / "model.safetensors",
            "--posthoc-debias",
            "labeled",
        )
    assert not (tmp_path / "again").exists()


def test_resumed_run_cannot_take_one_prior_for_another(debiased, capsys):
    with refused(r"--debias-pseudo is 0\.0, but 1\.0 in the run to resume, which cannot change it", capsys):
        run(debiased[0], *LONG_TAIL, *RULES["adjust"], "--epochs", "3", "--resume", "auto")


@pytest.mark.parametrize("name", ["debias", "softmatch"])
def test_resumed_run_is_the_unbroken_one_to_the_bit(name, tmp_path, monkeypatch):
    flags = [*LONG_TAIL, *RULES[name]]
    run(tmp_path / "whole", *flags)
    record, calls = train_ssl.optimizer_step, []

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise KilledError
        return record(*args, **kwargs)

    monkeypatch.setattr(train_ssl, "optimizer_step", killed)
    with pytest.raises(KilledError):
        run(tmp_path / "broken", *flags, "--recovery-interval", "2")
    monkeypatch.undo()
    results = run(tmp_path / "broken", *flags, "--recovery-interval", "2", "--resume", "auto")
    assert_same_run(tmp_path / "broken", tmp_path / "whole")
    whole, broken = (
        torch.load(tmp_path / f / "last.pth.tar", weights_only=False)["task_state"]["pseudo_labels"]
        for f in ("whole", "broken")
    )
    assert all(torch.equal(whole[key], broken[key]) for key in whole)
    assert results["pseudo_labels"] == json.loads((tmp_path / "whole" / "metrics.json").read_text())["pseudo_labels"]


def test_third_stage_starts_student_and_teacher_from_the_seconds_teacher(tmp_path, monkeypatch):
    stage2 = [
        "--ssl-method",
        "supervised",
        "--tune-scope",
        "ssm",
        "--layer-decay",
        "0.9",
        "--posthoc-debias",
        "unlabeled",
    ]
    first = run(tmp_path / "stage2", *LONG_TAIL, *stage2, "--threshold", "0.7")
    assert first["teacher_debiased"]["top1"] >= 0
    checkpoint = tmp_path / "stage2" / "last.pth.tar"
    _, teacher = states(tmp_path / "stage2")
    started = []

    def recorded(task, *args, **kwargs):
        started.append([{k: v.clone() for k, v in m.state_dict().items()} for m in models(task)])
        return step(task, *args, **kwargs)

    def models(task):
        return task.trainable_module, task.trainable_module_ema.module

    step = train_ssl.optimizer_step
    monkeypatch.setattr(train_ssl, "optimizer_step", recorded)
    flags = [*LONG_TAIL, "--initial-checkpoint", checkpoint]
    run(tmp_path / "stage3", *flags)
    for state in started[0]:
        assert all(torch.equal(state[key], teacher[key]) for key in teacher)
    # with the adjusted loss both heads lose the labels' prior, once; a resumed run does not lose it again
    run(tmp_path / "adjusted", *flags, *RULES["adjust"], "--epochs", "1")
    counts = torch.tensor([12, 9, 8, 6, 5, 4, 3, 2, 2, 2.0])
    for state in started[6]:
        shift = teacher["head.bias"] - state["head.bias"]
        assert all(torch.equal(state[key], teacher[key]) for key in teacher if key != "head.bias")
        torch.testing.assert_close(shift, (counts / counts.sum()).log(), rtol=1e-4, atol=1e-4)
    run(tmp_path / "adjusted", *flags, *RULES["adjust"], "--epochs", "2", "--resume", "auto")
    assert not torch.allclose(started[9][0]["head.bias"], started[6][0]["head.bias"] - (counts / 53).log(), atol=0.1)
    config = json.loads((tmp_path / "adjusted" / "config.json").read_text())
    assert config["logit_adjustment"] == {"by": "loss", "tau": 1.0}


def test_scope_of_training_is_that_of_the_flag(tmp_path, monkeypatch):
    create, trained = train_ssl.create_optimizer, []

    def recorded(args, model, *rest):
        trained.extend(name for name, p in model.named_parameters() if p.requires_grad)
        return create(args, model, *rest)

    monkeypatch.setattr(train_ssl, "create_optimizer", recorded)
    run(tmp_path / "run", *LONG_TAIL, "--tune-scope", "head", "--epochs", "1")
    assert trained == ["head.weight", "head.bias"]


@pytest.mark.parametrize("model", ["test_vit", "test_resnet"])
def test_any_timm_model_is_a_student(model, tmp_path):
    size = ["--img-size", "32"] if model == "test_vit" else ["--input-size", "1", "32", "32"]
    flags = ["--model", model, *size, "--pseudo-mixup", "prob", "--epochs", "1"]
    results = run(tmp_path / "run", *LONG_TAIL, *RULES["debias"], *flags)
    assert results["teacher"]["balanced_acc"] > 0


RECIPES = sorted((ROOT / "benchmarks" / "recipes").glob("*.yaml"))


def recipe_args(path):
    """Flags of a recipe, with the words that its header gives to train_ssl.py, on a miniature model."""
    (command,) = re.findall("^# train_ssl.py (.*)$", path.read_text(), re.MULTILINE)
    words = command.replace(f"benchmarks/recipes/{path.name}", str(path)).replace("DATA", ".")
    return train_ssl.parse_args([*shlex.split(words), "--model", "test_vim"])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_command_of_a_recipe_is_taken_and_its_rate_suits_adamw(path):
    args = recipe_args(path)
    assert args.opt == "adamw"
    assert args.weight_decay == 0.05
    assert 1e-4 < scaled_lr(args, 8 * 128) < 5e-3  # of 8 GPUs x 128 images


def test_recipes_that_follow_each_other_train_one_model_and_keep_its_teacher():
    assert [path.stem for path in RECIPES] == ["finetune", "rare", "ssl"]
    first, *later = (recipe_args(path) for path in RECIPES)
    for args in later:
        assert (args.gp, args.img_size) == (first.gp, first.img_size) == ("avg", 224)
        assert teacher_kwargs(args)["use_warmup"] is False


def test_the_recipe_for_rare_classes_goes_on_from_a_teacher(tmp_path):
    split = LONG_TAIL[:-2]  # the recipe does not set the decay of a short run
    run(tmp_path / "labels", *LONG_TAIL, "--gp", "avg", "--img-size", "32", "--ssl-method", "supervised")
    start = ["--initial-checkpoint", tmp_path / "labels" / "last.pth.tar", "--img-size", "32", "--lr", "0"]
    recipe = ["-c", ROOT / "benchmarks" / "recipes" / "rare.yaml"]
    place = ["--output", tmp_path, "--experiment", "ssl"]
    train_ssl.main([str(word) for word in (*TINY, *recipe, *split, *start, *place)])  # no flag but the recipe's
    assert json.loads((tmp_path / "ssl" / "config.json").read_text())["logit_adjustment"]["by"] == "unlabeled"
    _, started = states(tmp_path / "labels")
    _, teacher = states(tmp_path / "ssl")
    assert all(torch.equal(started[key], teacher[key]) for key in started)  # not the student; no rate, no change
