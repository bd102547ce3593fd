import argparse
import copy
import os
import pickle
import stat

import pytest
import timm
import torch
from safetensors import SafetensorError

from semivim.cli import main
from semivim.convert import convert
from semivim.models.vim_weights import WEIGHTS_ENTRY
from semivim.runs.checkpoint import save_model
from tests.dyvm_models import lively
from tests.released import as_bytes, released_state, released_weights


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(5)
    return [timm.create_model("test_vim", num_classes=10).eval() for _ in range(2)]


@pytest.fixture
def checkpoint(models, tmp_path):
    path = tmp_path / "in.pth"
    path.write_bytes(as_bytes(released_state(*models)))
    return path


@pytest.mark.parametrize(("entry", "index"), [("", 0), ("model", 0), ("model_ema", 1)])
def test_a_published_file_becomes_a_timm_folder(checkpoint, tmp_path, models, entry, index):
    convert(checkpoint, "test_vim", tmp_path / "out", entry)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    restored = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(restored(x), models[index](x))
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []
    # others may read what the owner's mask lets them read, not what a temporary folder would
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out", *(tmp_path / "out").iterdir())]
    umask = os.umask(0)
    os.umask(umask)
    assert modes == [0o777 & ~umask, 0o666 & ~umask, 0o666 & ~umask]


def test_a_released_dyvm_becomes_a_timm_folder(tmp_path):
    model = lively(num_classes=10)
    path = tmp_path / "in.pth"
    path.write_bytes(as_bytes(released_state(model, timm.create_model("test_dyvm", num_classes=10))))
    convert(path, "test_dyvm", tmp_path / "out")
    restored = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(restored(x), model(x))
    with pytest.raises(ValueError, match="in.pth does not fit test_vim: checkpoint has .* keys that the model lacks"):
        convert(path, "test_vim", tmp_path / "other")


def test_headless_weights_give_a_model_without_a_head(tmp_path, models):
    path = tmp_path / "in.pth"
    torch.save({k: v for k, v in released_weights(models[0]).items() if "head" not in k}, path)
    converted = convert(path, "test_vim", tmp_path / "out")
    assert converted.num_classes == 0 and not converted.training


def test_the_base_model_takes_the_average(monkeypatch, checkpoint, tmp_path, models):
    monkeypatch.setitem(WEIGHTS_ENTRY, "test_vim", "model_ema")
    converted = convert(checkpoint, "test_vim", tmp_path / "out")
    assert torch.equal(converted.pos_embed, models[1].pos_embed)


def test_a_folder_that_does_not_give_the_same_logits_is_not_left_behind(checkpoint, tmp_path, monkeypatch):
    def save_something_else(model, folder):
        model = copy.deepcopy(model)
        model.head.bias.data[0] += 1e-3
        save_model(model, folder)

    monkeypatch.setattr("semivim.convert.save_model", save_something_else)
    with pytest.raises(ValueError, match=r"logits differ by 1\.00e-03, wanted 0"):
        convert(checkpoint, "test_vim", tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["in.pth"]


def test_command_line(checkpoint, tmp_path, capsys):
    main(["convert", str(checkpoint), str(tmp_path / "out"), "--model", "test_vim"])
    assert "out: test_vim, 62026 parameters, 10 classes; read again, its logits are" in capsys.readouterr().out


def fail(words, capsys):
    """Run the command with words that it must refuse, and give its one line."""
    with pytest.raises(SystemExit) as stop:
        main(["convert", *map(str, words)])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "not a readable torch file"),
        (b"some text\n", "not a readable torch file"),
        (pickle.dumps({"model": Evil()}, protocol=2), "not a readable torch file"),
        ([1, 2], "holds a list"),
        ({"model": 3}, "does not fit test_vim: model: wanted a dict of tensors, got int"),
        ({"model": {"pos_embed": "x"}}, "got str under 'pos_embed'"),
        ({"pos_embed": "x"}, "wanted 'model' among them"),
        ({"pos_embed": torch.ones(1)}, "pos_embed has shape (1,), wanted (1, patches + 1, 32)"),
        ({"head.weight": torch.tensor(1.0)}, "head.weight has shape ()"),
        ({"epoch": 1, "args": argparse.Namespace()}, "wanted 'model' among them"),
        ({}, "weights do not fit Vim by 73 names, such as cls_token"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value)[:30],
)
def test_a_file_that_holds_no_vim_is_one_line(content, message, tmp_path, capsys):
    path = tmp_path / "in.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    line = fail([path, tmp_path / "out", "--model", "test_vim"], capsys)
    assert message in line and "in.pth" in line
    assert [f.name for f in tmp_path.iterdir()] == ["in.pth"] * path.exists()


def test_every_other_mistake_is_one_line(checkpoint, tmp_path, capsys, models, monkeypatch):
    (tmp_path / "taken").mkdir()
    (tmp_path / "broken.pth").write_bytes(checkpoint.read_bytes()[:1000])
    weights = released_weights(models[0])
    torch.save({**weights, "gamma": torch.ones(1)}, tmp_path / "more.pth")
    torch.save(weights, tmp_path / "bare.pth")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    torch.save({**weights, "head.bias": torch.full((10,), torch.nan)}, tmp_path / "nan.pth")
    before = sorted(tmp_path.iterdir())
    for words, message in (
        (["in.pth", "taken", "--model", "test_vim"], "exists"),
        (["in.pth", "dangling", "--model", "test_vim"], "exists"),
        (["in.pth", "no/out", "--model", "test_vim"], "to create out in"),
        (["in.pth", "in.pth/out", "--model", "test_vim"], "to create out in"),
        (["in.pth", "out", "--model", "resnet18"], "wanted one of dyvm_base"),
        (["in.pth", "out", "--model", "test_vmi"], "; did you mean test_vim?"),
        (["in.pth", "takn/out", "--model", "test_vim"], "taken?"),
        (["in.pth", "out", "--model", "vim_base_patch16_224.hustvl_in1k"], "wanted one of dyvm_base"),
        (["in.pth", "out"], "--model"),
        (["in.pth", "out", "--model", "test_vim", "--entri", "model"], "did you mean --entry?"),
        (["broken.pth", "out", "--model", "test_vim"], "not a readable torch file"),
        (["taken", "out", "--model", "test_vim"], "taken"),
        (["more.pth", "out", "--model", "test_vim"], "1 keys that the model lacks: gamma"),
        (["bare.pth", "out", "--model", "test_vim", "--entry", "model_ema"], "bare.pth has none, it holds "),
        (["nan.pth", "out", "--model", "test_vim"], "not finite"),
        (["in.pth", "out", "--model", "semivim_pico"], "does not fit semivim_pico"),
    ):
        assert message in fail([*(tmp_path / word for word in words[:2]), *words[2:]], capsys)

    def no_space(model, folder):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    assert "cannot write /proc/out: " in fail([checkpoint, "/proc/out", "--model", "test_vim"], capsys)
    monkeypatch.setattr("semivim.convert.save_model", no_space)
    line = fail([checkpoint, tmp_path / "out", "--model", "test_vim"], capsys)
    assert f"cannot write {tmp_path / 'out'}: " in line and "No space left on device" in line
    assert sorted(tmp_path.iterdir()) == before
