import os
import pickle
from argparse import Namespace

import pytest
import torch

from semivim.utils.files import atomic_path, load_untrusted, write_text


def test_write_replaces_the_whole_file_or_nothing(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="disk"), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError("disk")
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


NOT_CHECKPOINTS = {
    "text": b"hello world\n this is text",
    "page": b"<html><body>not found</body></html>",
    "empty": b"",
    "cut float": b"GxF\x8c\xd6\xfc",
    "not utf-8": b"\x80\xcc\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03",
    "empty stack": b"\x80Q\x85",
    "code": pickle.dumps(Evil(), protocol=2),
}


@pytest.mark.parametrize("content", NOT_CHECKPOINTS.values(), ids=NOT_CHECKPOINTS)
def test_any_file_that_torch_cannot_read_is_one_line(content, tmp_path):
    (tmp_path / "f.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"^\S+f\.pth is not a readable torch file: [^\n]+$") as error:
        load_untrusted(tmp_path / "f.pth")
    assert "Weights only" not in str(error.value)


@pytest.mark.parametrize("content", [3, [1, 2], torch.zeros(2)], ids=["int", "list", "tensor"])
def test_a_torch_file_of_anything_but_a_dict_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "f.pth")
    with pytest.raises(ValueError, match=rf"f\.pth holds a {type(content).__name__}, wanted a dict"):
        load_untrusted(tmp_path / "f.pth")


def test_missing_files_and_folders_are_named_and_a_namespace_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.pth is not a readable torch file: .*No such file"):
        load_untrusted(tmp_path / "absent.pth")
    with pytest.raises(ValueError, match=r"is not a readable torch file: .*Is a directory"):
        load_untrusted(tmp_path)
    torch.save({"args": Namespace(lr=0.1)}, tmp_path / "f.pth")
    assert load_untrusted(str(tmp_path / "f.pth"))["args"].lr == 0.1
