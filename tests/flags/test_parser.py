import argparse

import pytest
from timm.utils import ParseKwargs

from semivim.flags.parser import COUNT, Name, Number, Parser, assignment


@pytest.fixture
def parser():
    parser = Parser(prog="train", allow_abbrev=False)
    parser.add_argument("--decay", type=Number(0, 1, ends="[)"), default=0.1, help="decay")
    parser.add_argument("--epochs", type=COUNT, default=7, help="epochs")
    parser.add_argument("--scale", type=Number(0, ends="()"), nargs=2, default=[0.5, 1.0], help="area")
    parser.add_argument("--mean", type=Number(), nargs="+", help="mean of %(prog)s")
    parser.add_argument("--mode", default="", choices=["norm", "value"], help="way")
    parser.add_argument("--opt", type=Name("an optimizer", lambda: ["adam", "sgd"]), default="sgd", help="optimizer")
    parser.add_argument("--options", type=assignment, nargs="*", default={}, action=ParseKwargs, help="options")
    parser.add_argument("--model", default="vim", help="model")
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    return parser


def refusal(capsys, call, *args):
    with pytest.raises(SystemExit) as error:
        call(*args)
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("train: error: ")
    assert said.count("\n") == 1
    return said.removeprefix("train: error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("number", "good", "bad"),
    [
        (Number(), ["-3", "1e-4"], ["nan", "inf", "-inf", "x", ""]),
        (Number(0), ["0", "7.5"], ["-0.1", "nan", "inf"]),
        (Number(0, ends="()"), ["1e-9"], ["0", "-1"]),
        (Number(0, 1), ["0", "1"], ["-0.001", "1.001"]),
        (Number(0, 1, ends="[)"), ["0", "0.999"], ["1", "-1"]),
        (Number(0, 1, ends="(]"), ["0.001", "1"], ["0", "2"]),
        (Number(0, kind=int), ["0", "12"], ["-1", "1.5", "1e3", "9" * 400]),
    ],
    ids=lambda value: value.interval if isinstance(value, Number) else "",
)
def test_number_takes_its_interval_and_nothing_else(number, good, bad):
    for text in good:
        assert number(text) == float(text)
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="is not a (whole|finite) number"):
            number(text)


def test_number_is_of_its_kind():
    assert isinstance(COUNT("3"), int)
    assert isinstance(Number(0)("3"), float)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--decay 1", "argument --decay: 1 is not a finite number in [0, 1)"),
        ("--epochs 0", "argument --epochs: 0 is not a whole number >= 1"),
        ("--scale 0 1", "argument --scale: 0 is not a finite number > 0"),
        ("--mean nan", "argument --mean: nan is not a finite number"),
        ("--opt adan", "argument --opt: 'adan' is not an optimizer (did you mean adam?)"),
        ("--options depth", "argument --options: 'depth' is not NAME=VALUE"),
        ("--options =3", "argument --options: '=3' is not NAME=VALUE"),
        ("--epoch 3", "unrecognized arguments: --epoch 3 (did you mean --epochs?)"),
        ("--x --dekay=3", "unrecognized arguments: --x --dekay=3 (did you mean --decay?)"),
    ],
)
def test_wrong_word_is_one_line_that_names_flag_value_and_what_is_wanted(parser, capsys, words, message):
    assert refusal(capsys, parser.parse_args, words.split()) == message


def test_help_says_range_and_default(parser):
    lines = {" ".join(line.split()) for line in parser.format_help().splitlines()}
    assert {
        "--decay X decay; in [0, 1); default 0.1",
        "--epochs N epochs; >= 1; default 7",
        "--scale X X area; > 0; default 0.5 1",
        "--mean X [X ...] mean of train",
        "--opt OPT optimizer; default sgd",
        "--amp mixed precision",
    } <= lines
    assert any(line.endswith("options") for line in lines)


def test_values_of_a_file_become_what_the_command_line_gives(parser, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("decay: 5e-1\nscale: [0.25, '1']\noptions: {depth: 2}\namp: true\nmean: null\nmodel: 2024\n")
    values = parser.read_config(str(path))
    words = ["--decay", "5e-1", "--scale", "0.25", "1", "--options", "depth=2", "--amp", "--model", "2024"]
    assert values == {key: value for key, value in vars(parser.parse_args(words)).items() if key in values}


def test_defaults_of_the_flags_are_taken_back(parser):
    defaults = vars(parser.parse_args([]))  # --mode '' is none of its choices, --mean None no number
    assert parser.checked(defaults, "here") == defaults


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("opt: [adam", "not YAML"),
        ("- adam", "wanted 'flag: value' lines, got list"),
        ("optt: adam", "unknown key 'optt' (did you mean opt?)"),
        ("epochs: many", "epochs: many is not a whole number >= 1"),
        ("epochs: 0", "epochs: 0 is not a whole number >= 1"),
        ("epochs: true", "epochs: wanted one value, got True"),
        ("epochs: null", "epochs: wanted one value, got None"),
        ("decay: .nan", "decay: nan is not a finite number in [0, 1)"),
        ("decay: 1", "decay: 1 is not a finite number in [0, 1)"),
        ("opt: adan", "opt: 'adan' is not an optimizer (did you mean adam?)"),
        ("mode: hard", "mode: 'hard' is not one of norm, value"),
        ("model: no", "model: wanted one value, got False"),
        ("amp: 1", "amp: wanted true or false, got 1"),
        ("scale: [1, 2, 3]", "scale: wanted a list of 2 values, got [1, 2, 3]"),
        ("scale: [0, 1]", "scale: 0 is not a finite number > 0"),
        ("mean: []", "mean: wanted a list of values, got []"),
        ("options: 3", "options: wanted a mapping from names, got 3"),
        ("options: {1: 2}", "options: wanted a mapping from names, got {1: 2}"),
    ],
)
def test_bad_file_is_one_line_that_names_file_and_key(parser, tmp_path, capsys, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert refusal(capsys, parser.read_config, str(path)).startswith(f"--config {path}: {message}")


def test_missing_file_is_named(parser, capsys):
    assert refusal(capsys, parser.read_config, "absent.yaml") == "--config absent.yaml: No such file or directory"


def test_flag_that_nothing_reads_is_refused_unless_at_its_default(parser, capsys):
    owners = {"--amp": (False, "epochs decay")}
    parser.refuse_unread(parser.parse_args(["--epochs", "7"]), owners)
    parser.refuse_unread(parser.parse_args(["--epochs", "8"]), {"--amp": (True, "epochs decay")})
    said = refusal(capsys, parser.refuse_unread, parser.parse_args(["--decay", "0.5"]), owners)
    assert said == "--decay is read only with --amp, got 0.5"
    parser.set_defaults(decay=0.5)  # as a run's args.yaml does
    parser.refuse_unread(parser.parse_args([]), owners)


def test_a_name_may_be_written_in_capitals_as_timm_takes_it():
    optimizer = Name("an optimizer", lambda: ["adam", "sgd"])
    assert optimizer("Adam") == "Adam"
    with pytest.raises(argparse.ArgumentTypeError, match="'Adan' is not an optimizer.*adam"):
        optimizer("Adan")
