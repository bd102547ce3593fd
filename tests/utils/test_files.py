import os
import pickle
from argparse import Namespace
from itertools import pairwise

import pytest
import torch
import yaml
from safetensors.torch import save_file

from semivim.utils.files import atomic_path, load_untrusted, load_yaml, read_mapping, weights_shapes, write_text


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


@pytest.mark.parametrize(
    ("text", "cause"),
    [("a: [", "run: args.yaml: while parsing"), ("3", "run: args.yaml: wanted a mapping, got int"), (None, "No such")],
)
def test_a_mapping_in_yaml(text, cause, tmp_path):
    path = tmp_path / "args.yaml"
    path.write_text("lr: 0.5")
    assert read_mapping(path, yaml.safe_load, "run") == {"lr": 0.5}
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=cause) as caught:
        read_mapping(path, yaml.safe_load, "run")
    assert "\n" not in str(caught.value)


def test_yaml_that_stands_for_billions_is_refused():
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for old, new in pairwise("abcdefghij"):
        bomb += f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for text in (bomb, "a: &a [*a]", "[" * 100_000, "a: 2026-13-01", "a: ["):
        with pytest.raises(yaml.YAMLError):
            load_yaml(text)
    assert load_yaml("a: &a [1, 2]\nb: *a") == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(1).expand(10**6, 10**6),
        lambda: torch.zeros(1, 10).to_sparse(),
        lambda: torch.zeros(10**12, device="meta"),
    ],
    ids=["expanded", "sparse", "meta"],
)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_tensors_without_a_value_for_each_number_are_refused(make, tmp_path):
    """The first operation on one would take terabytes."""
    torch.save({"model": {"pos_embed": [make()]}}, tmp_path / "f.pth")
    with pytest.raises(ValueError, match=r"f\.pth holds a tensor of shape \(\d+.* without a value for each number in"):
        load_untrusted(tmp_path / "f.pth")


class Hooked:
    """Becomes a tensor whose hooks are what a foreign file says they are."""

    def __reduce__(self):
        storage = torch.zeros(2).storage()
        return torch._utils._rebuild_tensor_v2, (storage, 0, (2,), (1,), False, 3)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_tensor_with_hooks_is_refused(tmp_path):
    torch.save({"weight": Hooked()}, tmp_path / "f.pth")
    with pytest.raises(ValueError, match=r"f\.pth holds a tensor with hooks, wanted one without"):
        load_untrusted(tmp_path / "f.pth")


def test_containers_that_hold_themselves_are_read(tmp_path):
    loop = {"a": torch.zeros(2).t()}
    loop["loop"] = [loop]
    torch.save(loop, tmp_path / "f.pth")
    assert load_untrusted(tmp_path / "f.pth")["a"].shape == (2,)


def test_shapes_come_from_the_header(tmp_path):
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(())}, tmp_path / "w.safetensors")
    assert sorted(weights_shapes(tmp_path / "w.safetensors").values()) == [(), (2, 3)]
