import json
import logging
import sys
import warnings

import pytest
from PIL import Image

from semivim.cli import main
from semivim.utils.terminal import escape, escape_lines
from semivim.utils.user_error import UserError, user_errors_end_the_program
from tests.run_folder import write_run

HOSTILE = "a\x1b[2J\x07\u202eb\nerror: c\r\x9b1m\u2028\udcff\x7f"
SHOWN = r"a\x1b[2J\x07\u202eb\nerror: c\r\x9b1m\u2028\udcff\x7f"


def test_what_a_terminal_obeys_is_shown_and_the_rest_stays():
    assert escape(HOSTILE) == SHOWN
    assert escape("Käse 猫 é | C:\\x") == "Käse 猫 é | C:\\x"
    assert escape_lines("a\x1b\nb") == "a\\x1b\nb"


def test_predict_shows_labels_and_names_of_files_escaped(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    write_run(run)
    config = json.loads((run / "config.json").read_text())
    config["label_names"] = [f"{i}{HOSTILE}" for i in range(5)]
    (run / "config.json").write_text(json.dumps(config))
    names = [f"{HOSTILE}.png", f"{HOSTILE}2.png", f"{HOSTILE}3.png"]
    for name in names[:2]:
        Image.new("RGB", (40, 20), "white").save(tmp_path / name)
    (tmp_path / names[2]).write_bytes(b"no image")
    with pytest.raises(SystemExit):
        main(["predict", "--model", f"local-dir:{run}", *(str(tmp_path / name) for name in names)])
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 * (1 + 5)
    assert len(err.splitlines()) == 1
    assert (out + err).replace("\n", "").isprintable()
    assert f"  3{SHOWN}" in out
    assert f"{SHOWN}2.png:" in out
    assert "3.png" in err


def test_error_and_log_are_escaped(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["predict", "--model", "local-dir:a\x1b[2J\u202e", str(tmp_path)])
    assert r"a\x1b[2J\u202e" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        [HOSTILE],
        ["predict", "x", "--model", "m", f"--{HOSTILE}"],
        ["predict", "x", "--model", "m", "--topk", HOSTILE],
        ["publish", "x", "--repo", "a/b", HOSTILE],
    ],
)
def test_errors_of_the_parser_are_escaped(words, capsys):
    with pytest.raises(SystemExit):
        main(words)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.strip().isprintable()
    assert r"\x1b[2J" in said


def test_what_other_libraries_say_is_escaped_inside_a_program(capsys):
    """Their loggers have handlers of their own, and warnings have none."""
    logger = logging.getLogger("another library")
    handler = logging.StreamHandler(sys.stderr)
    logger.addHandler(handler)
    with user_errors_end_the_program("prog"):
        logger.warning("no file %s", HOSTILE)
        warned = warnings.formatwarning(UserWarning(f"odd {HOSTILE}"), UserWarning, "f.py", 3)  # what is printed
    logger.removeHandler(handler)
    assert capsys.readouterr().err == f"no file {SHOWN}\n"
    assert warned == f"f.py:3: UserWarning: odd {SHOWN}\n"
    assert logging.getLogRecordFactory() is logging.LogRecord


def test_traceback_of_a_users_mistake_is_escaped(capsys):
    with pytest.raises(SystemExit), user_errors_end_the_program("prog", debug=True):
        raise UserError(f"x {HOSTILE}")
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.replace("\n", "").isprintable()
