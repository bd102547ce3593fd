import pytest

from semivim.data import View
from semivim.flags import arm_flags
from semivim.flags.data_flags import add_augmentation_flags, add_dataset_flags
from semivim.flags.parser import COUNT, Parser
from semivim.flags.train_flags import add_optimizer_flags


def parse(words):
    parser = Parser(prog="train", allow_abbrev=False)
    add_dataset_flags(parser)
    add_augmentation_flags(parser, classifier=False)
    arm_flags.add_arm_flags(parser)
    add_optimizer_flags(parser)
    parser.add_argument("--batch-size", type=COUNT, default=128)
    args = parser.parse_args(words.split())
    parser.check(args)
    return args


def test_model_gets_what_the_flags_say():
    assert arm_flags.arm_kwargs(parse("")) == {
        "cluster": 4,
        "directions": "forward",
        "decoder_dim": 512,
        "decoder_depth": 4,
    }
    args = parse("--directions both --cluster 2 --dec-dim 64 --dec-depth 1")
    assert tuple(arm_flags.arm_kwargs(args).values()) == (2, "both", 64, 1)


def test_views_are_crops_and_flips_only():
    options = arm_flags.arm_view_kwargs(parse("--scale 0.2 1 --train-interpolation bicubic"))
    names = [type(step).__name__ for step in View((3, 32, 32), (0.5,) * 3, (0.5,) * 3, **options).transform.transforms]
    assert names[:2] == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip"]
    assert len(names) == 3  # and the conversion to a tensor


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--directions both --batch-size 1", "--batch-size must be 2 or more, got 1"),
        ("--directions backward", "invalid choice: 'backward'"),
        ("--scale 1 0.2", "wanted rising values, got 1 0.2"),
        ("--layer-decay 0.8", "--layer-decay is for fine-tuning"),
        (
            f"--data-dir {__file__} --val-split test",
            "--val-split is read only with a data set of splits, no heap or tar ",
        ),
        (
            "--unlabeled-dir . --val-split test",
            "--val-split is read only with a data set of splits, no heap or tar file",
        ),
        ("--unlabeled-dir . --train-split all", "--train-split is read only with a data set of splits, no heap or tar"),
        ("--mixup 0.8", "unrecognized arguments: --mixup 0.8"),
    ],
)
def test_what_does_not_fit_is_one_line(words, message, capsys):
    with pytest.raises(SystemExit):
        parse(words)
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "words", ["--data-dir .", "--data-dir . --unlabeled-dir .", "--dataset hfds/x --unlabeled-dir ."]
)
def test_splits_of_a_data_set_are_named(words):
    assert parse(f"{words} --train-split a --val-split b").val_split == "b"
