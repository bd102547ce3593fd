import pytest

from semivim.utils import train_flags

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
GROUPS = ["dataset", "device", "optimizer", "schedule", "augmentation", "ema", "misc"]


@pytest.fixture
def parser():
    parser = train_flags.Parser(prog="train", allow_abbrev=False)
    train_flags.add_model_flags(parser, model="vim_tiny_patch16_224")
    for group in GROUPS:
        getattr(train_flags, f"add_{group}_flags")(parser)
    return parser


def test_shared_flags_have_timms_defaults(parser):
    args = vars(parser.parse_args([]))
    assert {key: args[key] for key in TIMM} == TIMM


def test_every_flag_explains_itself(parser):
    assert [a.dest for a in parser._actions if not a.help] == []


def test_misspelt_flag_is_one_line_with_a_suggestion(parser, capsys):
    with pytest.raises(SystemExit) as error:
        parser.parse_args(["--weight-dekay", "1"])
    assert error.value.code == 2
    assert capsys.readouterr().err == (
        "train: error: unrecognized arguments: --weight-dekay 1 (did you mean --weight-decay?)\n"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("opt: [adamw", "not YAML"),
        ("- adamw", "wanted 'flag: value' lines, got list"),
        ("optt: adamw", "unknown key 'optt' (did you mean 'opt'?)"),
        ("epochs: many", "epochs: invalid literal for int() with base 10: 'many'"),
        ("epochs: 0", "epochs: 0 is not a positive whole number"),
        ("epochs: true", "epochs: wanted one value, got True"),
        ("clip_mode: hard", "clip_mode: 'hard' is not one of norm, value, agc"),
        ("scale: [1, 2, 3]", "scale: wanted a list of 2 values, got [1, 2, 3]"),
        ("model_kwargs: 3", "model_kwargs: wanted a mapping, got 3"),
    ],
)
def test_bad_config_is_one_line_that_names_file_and_key(parser, tmp_path, capsys, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit):
        train_flags.parse_flags(parser, ["-c", str(path)])
    error = capsys.readouterr().err
    assert f"--config {path}: " in error
    assert message in error
    assert error.count("\n") == 1


def test_missing_config_is_named(parser, capsys):
    with pytest.raises(SystemExit):
        train_flags.parse_flags(parser, ["--config", "absent.yaml"])
    assert "--config absent.yaml: No such file" in capsys.readouterr().err


def test_config_types_and_precedence(parser, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "lr: 3e-4\nopt_betas: [0.9, '0.95']\nmodel_kwargs: {depth: 2}\namp: true\nepochs: 7\nlr_noise: null\n"
    )
    args = train_flags.parse_flags(parser, ["-c", str(path), "--epochs", "9"])
    assert (args.lr, args.opt_betas, args.model_kwargs, args.amp, args.epochs) == (
        3e-4,
        [0.9, 0.95],
        {"depth": 2},
        True,
        9,
    )
    assert not hasattr(args, "config")


def test_learning_rate_scales_as_timms(parser):
    args = parser.parse_args([])
    assert train_flags.scaled_lr(args, 512) == pytest.approx(0.2)  # sgd: linear
    args = parser.parse_args(["--opt", "adamw"])
    assert train_flags.scaled_lr(args, 1024) == pytest.approx(0.2)  # adaptive: square root
    args = parser.parse_args(["--lr", "3e-4"])
    assert train_flags.scaled_lr(args, 1024) == 3e-4
