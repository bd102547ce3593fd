import errno

import pytest

from semivim.utils.user_error import UserError, one_line, short, user_errors_end_the_program, user_line


def end(error, capsys, debug=False):
    with pytest.raises(SystemExit) as stop, user_errors_end_the_program("prog", debug):
        raise error
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_users_mistake_is_one_line_and_status_2(capsys):
    assert end(UserError("--lr is 3, wanted 2"), capsys) == "prog: error: --lr is 3, wanted 2\n"


def test_debug_shows_the_traceback_and_the_line(capsys):
    said = end(UserError("--lr is 3, wanted 2"), capsys, debug=True)
    assert said.startswith("Traceback (most recent call last):")
    assert said.endswith("prog: error: --lr is 3, wanted 2\n")


@pytest.mark.parametrize("kind", [ValueError, AttributeError, OSError, RuntimeError])
def test_any_other_exception_keeps_its_traceback(kind, capsys):
    with pytest.raises(kind), user_errors_end_the_program("prog"):
        raise kind("a bug")
    assert capsys.readouterr().err == ""


class ImageError(UserError):
    pass


def test_error_of_a_loader_process_is_its_last_line():
    said = "Caught ImageError in DataLoader worker process 0.\nOriginal Traceback:\n  File x\n"
    assert user_line(ImageError(f"{said}semivim.data.ImageError: a.png is unreadable: cut\n")) == (
        "a.png is unreadable: cut"
    )
    assert user_line(ImageError("a.png: nothing")) == "a.png: nothing"


def test_one_line_of_an_exception():
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(KeyError("state_dict")) == "KeyError 'state_dict'"
    assert len(one_line(ValueError("a " * 500))) == 300


def test_full_disk_is_one_line_and_other_errors_of_files_stay(capsys):
    with pytest.raises(SystemExit) as stop, user_errors_end_the_program("prog"):
        raise OSError(errno.ENOSPC, "No space left on device", "run/summary.csv")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "prog: error: run/summary.csv: the disk is full\n"
    with pytest.raises(PermissionError), user_errors_end_the_program("prog"):
        raise PermissionError(errno.EACCES, "Permission denied", "a")


def test_a_long_value_is_cut_short():
    assert short([1, 2]) == "[1, 2]"
    assert len(short("x" * 100)) == 60
    bomb = ["x"] * 9
    for _ in range(40):
        bomb = [bomb] * 9  # 9 ** 41 items if they were written out
    assert len(short(bomb)) <= 60
