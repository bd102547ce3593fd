import pytest
from timm.data import Mixup

from semivim.data import View, open_source
from semivim.flags import data_flags
from semivim.flags.parser import COUNT, Parser
from semivim.utils.pixels import PixelRules
from semivim.utils.user_error import UserError


def parse(words):
    parser = Parser(prog="train", allow_abbrev=False)
    data_flags.add_dataset_flags(parser)
    data_flags.add_augmentation_flags(parser)
    parser.add_argument("--batch-size", type=COUNT, default=128)
    args = parser.parse_args(words.split())
    parser.check(args)
    return args


def test_data_set_is_opened_with_what_was_given_only():
    args = parse("--dataset embedded/digits")
    given = {"dataset": "embedded/digits", "data_dir": None}
    assert data_flags.source_kwargs(args) == given | {"rules": PixelRules((255, 255, 255), None)}
    assert len(open_source(split=args.train_split, **data_flags.source_kwargs(args))) > 1000
    words = "--dataset hfds/x --data-dir d --class-map m --dataset-download --input-key image --target-key label"
    kwargs = data_flags.source_kwargs(parse(f"{words} --dataset-trust-remote-code"))
    assert kwargs["trust_remote_code"] is kwargs["download"] is True
    assert (kwargs["class_map"], kwargs["input_key"], kwargs["target_key"]) == ("m", "image", "label")


def test_every_flag_of_a_view_reaches_it():
    words = "--no-aug --train-crop-mode rkrc --scale 0.5 1 --ratio 1 1 --hflip 0.1 --vflip 0.2 --color-jitter 0.3"
    words += " --color-jitter-prob 0.4 --grayscale-prob 0.5 --gaussian-blur-prob 0.6 --aa v0 --reprob 0.7 --remode rand"
    kwargs = data_flags.view_kwargs(parse(f"{words} --recount 2 --train-interpolation bicubic"))
    assert kwargs == {
        "train_crop_mode": "rkrc", "scale": [0.5, 1.0], "ratio": [1.0, 1.0], "hflip": 0.1, "vflip": 0.2,
        "interpolation": "bicubic", "no_aug": True, "color_jitter": 0.3, "color_jitter_prob": 0.4,
        "grayscale_prob": 0.5, "gaussian_blur_prob": 0.6, "auto_augment": "v0", "re_prob": 0.7, "re_mode": "rand",
        "re_count": 2,
    }  # fmt: skip
    view = View((3, 32, 32), (0.5,) * 3, (0.5,) * 3, **data_flags.view_kwargs(parse("--aa v0 --reprob 0.5")))
    assert view.erasing.probability == 0.5


def test_rules_for_pixels_reach_the_source():
    args = parse("--dataset embedded/digits --alpha-background #102030 --max-value 4095")
    assert open_source(**data_flags.source_kwargs(args)).rules == PixelRules((16, 32, 48), 4095)
    assert open_source(**data_flags.source_kwargs(parse("--dataset embedded/digits"))).rules == PixelRules()


@pytest.mark.parametrize("said", [{"in_chans": 4}, {"input_size": [4, 32, 32]}])
def test_four_channels_keep_alpha_and_contradict_a_background(said):
    args = parse("--dataset embedded/digits --max-value 4095")
    vars(args).update(said)
    assert data_flags.source_kwargs(args)["rules"] == PixelRules(None, 4095)
    args.alpha_background = "white"
    with pytest.raises(UserError, match="^--alpha-background: got white, but alpha is kept as the fourth channel$"):
        data_flags.source_kwargs(args)


@pytest.mark.parametrize("words", ["--alpha-background blurple", "--max-value 0", "--max-value x"])
def test_odd_rules_for_pixels_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        parse(words)
    assert f"argument {words.split()[0]}: {words.split()[1]}" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--mixup 0.2", "--cutmix 1", "--cutmix-minmax 0.2 0.8"])
def test_mixup_is_on_where_one_of_its_flags_is(words):
    assert data_flags.mixes(parse(words))
    assert not data_flags.mixes(parse(""))
    args = parse(f"{words} --mixup-prob 0.5 --mixup-switch-prob 0.25 --mixup-mode pair --smoothing 0.2")
    mixup = Mixup(**data_flags.mixup_kwargs(args), num_classes=4)
    assert (mixup.mix_prob, mixup.switch_prob, mixup.mode, mixup.label_smoothing) == (0.5, 0.25, "pair", 0.2)
