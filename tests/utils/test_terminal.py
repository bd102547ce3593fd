import json

import pytest
from PIL import Image

from semivim.cli import main
from semivim.utils.terminal import escape, escape_lines
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
