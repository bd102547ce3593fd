import pytest
import timm

from semivim.data import View
from semivim.flags import ssl_flags
from semivim.flags.data_flags import add_augmentation_flags, add_dataset_flags
from semivim.flags.model_flags import add_ema_flags
from semivim.flags.parser import Parser
from semivim.flags.ssl_flags import add_semi_supervised_flags
from semivim.layers.ssmixup_readout import SSMIXUP_C
from semivim.task.semi_supervised import METHODS, SemiSupervisedTask

SPLIT = ["--labels-per-class", "4"]


def make_parser():
    parser = Parser(prog="train", allow_abbrev=False)
    add_dataset_flags(parser)
    add_ema_flags(parser)
    add_semi_supervised_flags(parser)
    return parser


def parse(words):
    parser = make_parser()
    args = parser.parse_args(words)
    parser.check(args)
    return args


def refusal(capsys, words):
    with pytest.raises(SystemExit) as error:
        parse(words)
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said.removeprefix("train: error: ").rstrip("\n")


def test_groups_and_defaults():
    parser = make_parser()
    titles = [group.title for group in parser._action_groups]
    assert titles[-4:] == ["Semi-supervised method", "Label split", "Unlabelled views", "LyapEMA"]
    args = parser.parse_args([])
    assert (args.ssl_method, args.pseudo_mixup, args.threshold) == ("lyapema", "none", 0.7)  # Semi-ViM section 5
    assert args.label_fraction is args.labels_per_class is args.imb_n1 is args.labeled_list is None
    assert [a.dest for a in parser._actions if not a.help] == []


def test_choices_are_those_of_the_code_that_takes_them():
    choices = {a.dest: a.choices for a in make_parser()._actions}
    assert tuple(choices["ssmixup_c"]) == SSMIXUP_C  # a layer, which a task may not import
    assert choices["lyap_mode"] == ["default", "paper_stable", "literal"]


@pytest.mark.parametrize(
    "words",
    [
        "--pseudo-mixup cut", "--threshold 1", "--threshold nan", "--unlabeled-ratio 0", "--unlabeled-weight nan",
        "--unlabeled-weight -1", "--ssmixup-nu nan", "--ssmixup-nu -5", "--ssmixup-c none", "--ssmixup-layers 0",
        "--label-fraction 0", "--label-fraction 1.5", "--labels-per-class -1", "--min-per-class -1", "--imb-n1 0",
        "--imb-m1 0", "--imb-factor-l 0.5", "--imb-factor-l nan", "--imb-factor-u inf", "--fold -1", "--split-seed -1",
        "--weak-color-jitter -1", "--strong-aa randm9", "--strong-reprob 2", "--lyap-mode ema", "--lyap-min-decay 1.5",
        "--lyap-gamma -1", "--lyap-radius nan", "--lyap-radius -1",
    ],
)  # fmt: skip
def test_wrong_value_is_refused_where_it_is_read(words, capsys):
    flag, value = words.split()
    said = refusal(capsys, words.split())
    assert said.startswith(f"argument {flag}: ")
    assert value in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--lyap-mode literal --no-model-ema-warmup",
            "--model-ema-warmup is read only with --lyap-mode default, got False",
        ),
        ("--lyap-mode paper_stable --model-ema-decay 0.9", "--model-ema-decay is read only with --lyap-mode default"),
        (
            "--lyap-mode literal --model-ema-decay 0.9",
            "--model-ema-decay is read only with --lyap-mode default, got 0.9",
        ),
        ("--lyap-mode paper_stable --lyap-min-decay 0.9", "--lyap-min-decay is read only with --lyap-mode default"),
        (
            "--lyap-mode literal --lyap-radius 0.1",
            "--lyap-radius is read only with --lyap-mode default or paper_stable",
        ),
        ("--ssmixup-nu 0.5", "--ssmixup-nu is read only with --pseudo-mixup ss, got 0.5"),
        ("--imb-m1 9", "--imb-m1 is read only with --imb-n1, got 9"),
        ("--imb-factor-l 10", "--imb-factor-l is read only with --imb-n1, got 10"),
        ("--imb-factor-u -10", "--imb-factor-u is read only with --imb-n1, got -10"),
        ("--unlabeled-list f", "--unlabeled-list is read only with --labeled-list, got f"),
        ("--imb-factor-u 0.5", "argument --imb-factor-u: 0.5 is not >= 1 or, to reverse the classes, <= -1"),
        ("--model-ema-decay 0.9 --lyap-min-decay 0.95", "--model-ema-decay 0.9 is below --lyap-min-decay 0.95"),
        ("--lyap-min-decay 1", "--model-ema-decay 0.9998 is below --lyap-min-decay 1"),
    ],
)
def test_flag_without_effect_or_against_another_is_one_line(words, message, capsys):
    assert refusal(capsys, [*SPLIT, *words.split()]).startswith(message)


@pytest.mark.parametrize(
    ("words", "unused"),
    [
        (
            "--ssl-method supervised --strong-aa v0 --threshold 0.9 --lyap-gamma 5 --pseudo-mixup ss --ssmixup-nu 1",
            "--threshold, --strong-aa, --pseudo-mixup, --ssmixup-nu, --lyap-gamma",
        ),
        ("--ssl-method fixmatch --lyap-gamma 5 --lyap-radius 1", "--lyap-gamma, --lyap-radius"),
        ("--ssl-method ema-teacher --lyap-mode literal --model-ema-decay 0.9", "--lyap-mode"),
    ],
)
def test_what_only_another_method_reads_is_named_in_one_line(words, unused, caplog):
    args = parse([*SPLIT, *words.split()])
    assert caplog.messages == [f"--ssl-method {args.ssl_method} leaves unused: {unused}"]
    assert args.ssl_method != "supervised" or ssl_flags.ssmixup_kwargs(args) == {}


def test_a_heap_needs_no_split_flag(capsys):
    assert ssl_flags.make_split_kwargs(parse(["--unlabeled-dir", "heap"]))["fraction"] == 1.0
    assert ssl_flags.make_split_kwargs(parse(["--unlabeled-dir", "heap", *SPLIT]))["fraction"] is None
    assert refusal(capsys, []).startswith("give one of --label-fraction")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--val-fraction 0.1 --val-list f", "give one of --val-fraction and --val-list, got both"),
        ("--val-fraction 0.1 --val-split test", "--val-split is read only with neither --val-fraction nor --val-list"),
        ("--val-fraction 1", "argument --val-fraction: 1 is not a finite number in (0, 1)"),
    ],
)
def test_validation_images_come_from_one_place(words, message, capsys):
    assert refusal(capsys, [*SPLIT, *words.split()]).startswith(message)


def test_unlabelled_tail_needs_its_head(capsys):
    said = refusal(capsys, ["--imb-n1", "20", "--imb-factor-l", "4", "--imb-factor-u", "4"])
    assert said == "--imb-factor-u is read only with --imb-m1, got 4.0"


def test_list_is_no_draw(capsys):
    said = refusal(capsys, ["--labeled-list", "f", "--fold", "2"])
    assert said == "--fold is read only with a split that is drawn, without --labeled-list, got 2"


@pytest.mark.parametrize(
    "words",
    [
        "--imb-n1 20 --imb-factor-l 4 --imb-m1 40 --imb-factor-u -4",
        "--labeled-list f --unlabeled-list g",
        "--label-fraction 1 --ssl-method supervised --model-ema-decay 0.5 --no-model-ema-warmup",
        "--labels-per-class 1 --lyap-mode literal --lyap-gamma 2",
        "--labels-per-class 1 --lyap-mode paper_stable --lyap-radius 0",
        "--labels-per-class 1 --model-ema-decay 0.9",
        "--labels-per-class 1 --lyap-min-decay 0.5 --model-ema-decay 0.5 --min-per-class 0 --strong-aa=",
        "--labels-per-class 1 --ssl-method ema-teacher --model-ema-decay 0 --pseudo-mixup prob --threshold 0",
    ],
)
def test_what_has_an_effect_is_taken(words):
    parse(words.split())


def all_flags(words):
    parser = Parser(prog="train", allow_abbrev=False)
    add_dataset_flags(parser)
    add_augmentation_flags(parser)
    add_ema_flags(parser)
    add_semi_supervised_flags(parser)
    return parser.parse_args(words.split())


def test_split_flags_become_arguments_of_the_split():
    args = all_flags("--imb-n1 20 --imb-factor-l 4 --imb-m1 40 --imb-factor-u -4 --fold 3 --split-seed 5")
    assert ssl_flags.make_split_kwargs(args) == {
        "fraction": None, "per_class": None, "imb_n1": 20, "imb_m1": 40, "imb_factor_l": 4.0, "imb_factor_u": -4.0,
        "min_per_class": 1, "include_labelled": False, "seed": 5, "fold": 3,
    }  # fmt: skip
    assert set(ssl_flags.SPLIT_FLAGS) <= set(vars(args))


def test_views_share_the_crop_and_differ_in_strength():
    args = all_flags("--scale 0.5 1 --weak-color-jitter 0.1 --strong-reprob 0.4 --aa v0 --reprob 0.2")
    weak, strong = ssl_flags.weak_view_kwargs(args), ssl_flags.strong_view_kwargs(args)
    assert weak["scale"] == strong["scale"] == [0.5, 1.0]
    assert (weak["color_jitter"], strong["color_jitter"]) == (0.1, None)
    assert (weak.get("auto_augment"), strong["auto_augment"]) == (None, "rand-m9-mstd0.5-inc1")
    assert (weak.get("re_prob"), strong["re_prob"]) == (None, 0.4)
    for kwargs in (weak, strong):
        View((3, 32, 32), (0.5,) * 3, (0.5,) * 3, **kwargs)


def test_model_mixes_hidden_states_only_with_ssmixup():
    assert ssl_flags.ssmixup_kwargs(all_flags("")) == {}
    kwargs = ssl_flags.ssmixup_kwargs(all_flags("--pseudo-mixup ss --ssmixup-layers 2"))
    assert kwargs == {"ssmixup_c": "own", "ssmixup_layers": 2}


def test_teacher_gets_the_options_of_its_method():
    plain = ssl_flags.teacher_kwargs(all_flags("--ssl-method fixmatch --model-ema-decay 0.9 --no-model-ema-warmup"))
    assert plain == {"decay": 0.9, "use_warmup": False, "update_after_step": -1}
    default = ssl_flags.teacher_kwargs(all_flags("--lyap-min-decay 0.5"))
    assert (default["mode"], default["decay"], default["min_decay"]) == ("default", 0.9998, 0.5)
    assert ssl_flags.teacher_kwargs(all_flags("--lyap-mode paper_stable"))["decay"] is None
    assert ssl_flags.task_kwargs(all_flags("--unlabeled-weight 2"))["unlabelled_weight"] == 2


@pytest.mark.parametrize("warmup", ["", "--no-model-ema-warmup"])
def test_every_method_has_the_same_warm_up(warmup):
    """A comparison of methods must not be one of warm-ups: by default a teacher follows its student in a short run."""
    model = timm.create_model("test_vim", num_classes=3)

    def decays(method):
        task = SemiSupervisedTask(model, 3, method=method)
        ema = task.setup_ema(**ssl_flags.teacher_kwargs(all_flags(f"--ssl-method {method} {warmup}")))
        return [ema.get_decay(step) for step in (2, 10, 100, 10**7)]

    caps = [1 - (1 + step) ** (-2 / 3) for step in (2, 10, 100)]
    wanted = [0.9998] * 4 if warmup else [*caps, 0.9998]
    for method in METHODS:
        assert decays(method) == wanted
