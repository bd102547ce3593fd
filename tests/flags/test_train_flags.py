import argparse
import re

import pytest
import torch

from semivim.flags import data_flags, model_flags, train_flags
from semivim.flags.parser import Number, Parser, parse_flags
from semivim.utils.user_error import UserError

# timm 1.0's train.py: flag -> default, for the flags shared with it
TIMM = {
    "train_split": "train", "val_split": "validation", "batch_size": 128, "grad_accum_steps": 1, "amp_dtype": "float16",
    "opt": "sgd", "momentum": 0.9, "weight_decay": 2e-5, "clip_mode": "norm", "layer_decay_min_scale": 0,
    "sched": "cosine", "lr_base": 0.1, "lr_base_size": 256, "lr_noise_pct": 0.67, "lr_noise_std": 1.0,
    "lr_cycle_mul": 1.0, "lr_cycle_decay": 0.5, "lr_cycle_limit": 1, "lr_k_decay": 1.0, "warmup_lr": 1e-5,
    "min_lr": 0, "epochs": 300, "decay_milestones": [90, 180, 270], "decay_epochs": 90, "warmup_epochs": 5,
    "cooldown_epochs": 0, "patience_epochs": 10, "decay_rate": 0.1, "scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3],
    "hflip": 0.5, "vflip": 0.0, "color_jitter": 0.4, "reprob": 0.0, "remode": "pixel", "recount": 1, "mixup": 0.0,
    "cutmix": 0.0, "mixup_prob": 1.0, "mixup_switch_prob": 0.5, "mixup_mode": "batch", "mixup_off_epoch": 0,
    "smoothing": 0.1, "train_interpolation": "random", "drop": 0.0, "model_ema_decay": 0.9998, "seed": 42,
    "log_interval": 50, "val_interval": 1, "recovery_interval": 0, "checkpoint_hist": 10, "workers": 4,
    "eval_metric": "top1",
}  # fmt: skip


def make_parser():
    parser = Parser(prog="train", allow_abbrev=False)
    model_flags.add_model_flags(parser, model="vim_tiny_patch16_224")
    for module in (data_flags, model_flags, train_flags):
        for name in vars(module):
            if name.startswith("add_") and name != "add_model_flags":
                getattr(module, name)(parser)
    return parser


@pytest.fixture
def parser():
    return make_parser()


def refusal(capsys, words):
    parser = make_parser()
    with pytest.raises(SystemExit) as error:
        parser.check(parse_flags(parser, words))
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said.removeprefix("train: error: ").rstrip("\n")


def test_shared_flags_have_timms_defaults(parser):
    args = vars(parser.parse_args([]))
    assert {key: args[key] for key in TIMM} == TIMM


@pytest.mark.parametrize(("words", "pinned"), [([], True), (["--pin-mem"], True), (["--no-pin-mem"], False)])
def test_only_batches_for_a_gpu_are_loaded_into_page_locked_memory(parser, words, pinned):
    args = parser.parse_args(["-j", "3", *words])
    for device, pin_memory in (("cuda", pinned), ("cpu", False)):
        wanted = {"device": torch.device(device), "num_workers": 3, "pin_memory": pin_memory}
        assert train_flags.loader_kwargs(args, torch.device(device)) == wanted


def test_every_flag_explains_itself_on_one_page(parser):
    assert [a.dest for a in parser._actions if not a.help] == []
    parse_flags(parser, [])
    assert parser.format_help().startswith("usage: train [-c FILE] [--FLAG VALUE ...]\n\n")


def test_no_number_is_free_to_be_nan_or_infinite(parser):
    numeric = [a for a in parser._actions if a.type in (int, float)]
    assert numeric == []
    numbers = [a for a in parser._actions if isinstance(a.type, Number)]
    assert len(numbers) > 60
    for action in numbers:
        for text in ("nan", "inf", "1e999"):
            with pytest.raises(argparse.ArgumentTypeError):
                action.type(text)


@pytest.mark.parametrize(
    "words",
    [
        "--clip-grad -1", "--clip-grad 0", "--std 0", "--mean 127.5", "--scale 0 1", "--ratio 0 0", "--crop-pct 0",
        "--smoothing 1", "--layer-decay -1", "--layer-decay 0", "--mixup -0.1", "--cutmix -1", "--lr -1",
        "--lr-noise-pct 0", "--lr-cycle-mul 0", "--decay-epochs 0", "--decay-rate -1", "--opt-betas 1",
        "--momentum -0.9", "--weight-decay -1", "--drop 1", "--drop-path 1", "--color-jitter -1", "--seed -1",
        "--opt-eps -1", "--hflip 2", "--model-ema-decay 1.1", "--warmup-lr -1", "--min-lr -1", "--img-size 0",
        "--decay-milestones 0", "--in-chans 2", "--amp-dtype float32", "--train-crop-mode rrr", "--sched cos",
        "--interpolation cubic", "--interpolation random", "--train-interpolation cubic", "--opt adamx",
        "--torchcompile inducto", "--torchcompile-mode fast", "--aa rand-x", "--aa rand-m1.5", "--aa rand-q3",
        "--aa rand-m9-tnone", "--aa v1", "--aa augmix-z2", "--aa 3aw", "--device-modules no.such os", "--opt-kwargs a",
        "--device-modules nosuchmodule", "--model-kwargs depth", "--batch-size 0", "--batch-size -4",
    ],
)  # fmt: skip
def test_wrong_value_is_refused_where_it_is_read(words, capsys):
    flag, value = words.split()[:2]
    said = refusal(capsys, words.split())
    assert re.match(rf"argument (-b/)?{flag}(/--dr)?: ", said)
    assert value in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--scale 1 0.5", "argument --scale: wanted rising values, got 1 0.5"),
        ("--ratio 2 1", "argument --ratio: wanted rising values, got 2 1"),
        ("--cutmix-minmax 0.5 0.5", "argument --cutmix-minmax: wanted rising values, got 0.5 0.5"),
        ("--decay-milestones 30 20", "argument --decay-milestones: wanted rising values, got 30 20"),
        ("--lr-noise 0 0.5 1", "argument --lr-noise: wanted one or two values, got 0 0.5 1"),
        ("--opt-betas 0.9", "argument --opt-betas: wanted two values or more, got 0.9"),
        ("--mean 0.5 0.5", "argument --mean: wanted one value for each channel (3), or one for all, got 0.5 0.5"),
        (
            "--in-chans 1 --std 1 1 1",
            "argument --std: wanted one value for each channel (1), or one for all, got 1 1 1",
        ),
        ("--input-size 2 32 32", "argument --input-size: wanted 1, 3 or 4 channels, got 2"),
        ("--resume auto", "--resume auto: needs --experiment to know which run to look for"),
        ("--no-resume-opt", "--no-resume-opt is read only with --resume, got True"),
        ("--in-chans 1 --input-size 3 32 32", "argument --in-chans: got 1, --input-size says 3"),
        ("--sched plateau --sched-on-updates", "argument --sched: plateau steps every epoch, got --sched-on-updates"),
        ("--mixup 1 -b 7", "--mixup and --cutmix pair images: --batch-size must be even, got 7"),
        ("--device gpu", "argument --device: gpu is not a device of torch, such as cpu, cuda or cuda:1"),
        ("--pretrained-path f.pth", "--pretrained-path is read only with --pretrained, got f.pth"),
        ("--amp-dtype bfloat16", "--amp-dtype is read only with --amp, got bfloat16"),
        ("--clip-mode agc", "--clip-mode is read only with --clip-grad, got agc"),
        ("--mixup-prob 0.5", "--mixup-prob is read only with --mixup or --cutmix, got 0.5"),
        ("--recount 3", "--recount is read only with --reprob above 0, got 3"),
        ("--torchcompile-mode default", "--torchcompile-mode is read only with --torchcompile, got default"),
    ],
)
def test_flags_that_contradict_each_other_are_one_line(words, message, capsys):
    assert refusal(capsys, words.split()) == message


@pytest.mark.parametrize(("device", "count"), [("xpu", 0), ("meta", 0), ("cuda:2", 2)])
def test_device_that_is_not_here_is_refused(device, count, monkeypatch, capsys, parser):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    said = f"{device} is not here: torch finds {count} devices of type {device.split(':')[0]}"
    assert refusal(capsys, ["--device", device]) == f"argument --device: {said}"
    for there in ("cpu", "cuda", "cuda:1"):
        parser.check(parser.parse_args(["--device", there]))


def test_cuda_is_refused_where_torch_finds_no_accelerator(monkeypatch, capsys):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: None)
    assert "torch finds 0 devices of type cuda" in refusal(capsys, ["--device", "cuda"])


def test_what_timm_takes_is_taken(parser):
    words = (
        "--aa= --clip-grad 1 --clip-mode agc --opt lookahead_adamw --opt-kwargs caution=True foreach=False "
        "--lr-noise 0.5 --decay-milestones 1 2 --scale 1 1 --cutmix-minmax 0.1 0.5 --mixup-mode elem --layer-decay 1 "
        "--torchcompile eager --model-kwargs depth=2 name= --device-modules os.path --device anything --lr 0 "
        "--mean 0 --std 1 --train-crop-mode rkrc --interpolation= --min-lr 0 --sched wsd --decay-epochs 0.2 "
        "--opt-betas 0.9 0.99 0.999 --amp --amp-dtype bfloat16 --mixup 0 --start-epoch 0 -b 128"
    )
    args = parse_flags(parser, words.split())
    parser.check(args)
    assert (args.aa, args.clip_grad, args.model_kwargs, args.interpolation) == ("", 1.0, {"depth": 2, "name": ""}, "")
    for policy in ("rand-m9-mstd0.5-inc1", "rand-m9-n3-tweights", "augmix-m5-w4-d2", "original-mstd0.5", "v0r", "3a"):
        assert data_flags.augment_policy(policy) == policy


def test_config_comes_after_defaults_and_before_the_command_line(parser, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lr: 3e-4\nopt_betas: [0.9, '0.95']\namp: true\nepochs: 7\nin_chans: null\n")
    defaults = {"epochs": 5, "lr": 1.0, "warmup_epochs": 2, "in_chans": 1}
    args = parse_flags(parser, ["-c", str(path), "--epochs", "9"], defaults)
    assert (args.lr, args.opt_betas, args.amp, args.epochs) == (3e-4, [0.9, 0.95], True, 9)
    assert (args.warmup_epochs, args.in_chans) == (2, None)
    assert not hasattr(args, "config")


def test_defaults_pass_the_checks_of_typed_values(parser, capsys):
    with pytest.raises(SystemExit):
        parse_flags(parser, [], {"smoothing": 1.0})
    assert capsys.readouterr().err == "train: error: defaults: smoothing: 1.0 is not a finite number in [0, 1)\n"


def test_learning_rate_scales_as_timms(parser):
    args = parser.parse_args([])
    assert train_flags.scaled_lr(args, 512) == pytest.approx(0.2)  # sgd: linear
    args = parser.parse_args(["--opt", "adamw"])
    assert train_flags.scaled_lr(args, 1024) == pytest.approx(0.2)  # adaptive: square root
    args = parser.parse_args(["--lr", "3e-4"])
    assert train_flags.scaled_lr(args, 1024) == 3e-4


def test_optimizer_and_schedule_are_those_of_the_flags(parser):
    args = parser.parse_args(
        ["--opt", "adamw", "--lr-base", "0.01", "--epochs", "8", "--warmup-epochs", "2", "--clip-grad", "0.5"]
    )
    model = torch.nn.Linear(3, 2)
    optimizer, scheduler, epochs = train_flags.create_optimizer(args, model, epoch_updates=4, images_per_update=64)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (args.lr, epochs, scheduler.warmup_t) == (pytest.approx(0.005), 8, 2)
    assert train_flags.clip_kwargs(args) == {"clip_grad": 0.5, "clip_mode": "norm"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--opt adamw --opt-kwargs foo=1", r"^--opt adamw, --opt-kwargs, --sched cosine: .*foo"),
        ("--sched wsd --decay-epochs 500", r"--sched wsd: .*decay_epochs"),
        ("--epochs 3 --start-epoch 3", r"^--start-epoch is 3, wanted less than the 3 epochs"),
    ],
)
def test_options_that_do_not_suit_the_optimizer_are_the_users(words, message, parser):
    with pytest.raises(UserError, match=message):
        train_flags.create_optimizer(parser.parse_args(words.split()), torch.nn.Linear(3, 2), 4, 64)


def test_watched_options_are_flags(parser):
    assert set(train_flags.OPTIMIZER_OPTIONS) <= set(vars(parser.parse_args([])))
