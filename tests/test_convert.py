import argparse
import copy
import pickle
import runpy
import sys

import pytest
import timm
import torch
from timm.models import save_for_hf

from semivim.convert import convert, main
from semivim.models.vim_weights import WEIGHTS_ENTRY
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


def test_headless_weights_give_a_model_without_a_head(tmp_path, models):
    path = tmp_path / "in.pth"
    torch.save({k: v for k, v in released_weights(models[0]).items() if "head" not in k}, path)
    assert convert(path, "test_vim", tmp_path / "out").num_classes == 0


def test_the_base_model_takes_the_average(monkeypatch, checkpoint, tmp_path, models):
    monkeypatch.setitem(WEIGHTS_ENTRY, "test_vim", "model_ema")
    converted = convert(checkpoint, "test_vim", tmp_path / "out")
    assert torch.equal(converted.pos_embed, models[1].pos_embed)


def test_a_folder_that_does_not_give_the_same_logits_is_not_left_behind(checkpoint, tmp_path, monkeypatch):
    def save_something_else(model, folder, **kwargs):
        model = copy.deepcopy(model)
        model.head.bias.data[0] += 1e-3
        save_for_hf(model, folder, **kwargs)

    monkeypatch.setattr("semivim.convert.save_for_hf", save_something_else)
    with pytest.raises(ValueError, match=r"logits differ by 1\.00e-03, wanted 0"):
        convert(checkpoint, "test_vim", tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["in.pth"]


def test_command_line(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "semivim.convert")
    monkeypatch.setattr(sys, "argv", ["convert", str(checkpoint), str(tmp_path / "out"), "--model", "test_vim"])
    runpy.run_module("semivim.convert", run_name="__main__")
    assert "out: test_vim, 62026 parameters, 10 classes; read again, its logits are" in capsys.readouterr().out


def test_every_mistake_is_one_line(checkpoint, tmp_path, capsys, models):
    (tmp_path / "taken").mkdir()
    (tmp_path / "broken.pth").write_bytes(checkpoint.read_bytes()[:1000])
    torch.save({**released_weights(models[0]), "gamma": torch.ones(1)}, tmp_path / "more.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with open(tmp_path / "evil.pth", "wb") as file:
        pickle.dump({"model": Evil()}, file, protocol=2)
    torch.save({"epoch": 1, "args": argparse.Namespace()}, tmp_path / "empty.pth")
    for words, message in (
        (["in.pth", "taken", "test_vim"], "exists"),
        (["in.pth", "out", "resnet18"], "wanted one of semivim_base"),
        (["absent.pth", "out", "test_vim"], "cannot read"),
        (["broken.pth", "out", "test_vim"], "cannot read"),
        (["evil.pth", "out", "test_vim"], "cannot read"),
        (["list.pth", "out", "test_vim"], "holds a list"),
        (["more.pth", "out", "test_vim"], "1 keys that the model lacks: gamma"),
        (["empty.pth", "out", "test_vim"], "wanted 'model' among them"),
        (["in.pth", "out", "semivim_pico"], "does not fit semivim_pico"),
    ):
        source, out, name = words
        with pytest.raises(SystemExit) as stop:
            main([str(tmp_path / source), str(tmp_path / out), "--model", name])
        assert stop.value.code == 2
        printed = capsys.readouterr()
        assert message in printed.err and "code ran" not in printed.out
    assert not (tmp_path / "out").exists()
