"""A folder's model, and one line for whatever is wrong with its files."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from semivim.hub.model_folder import load_folder, read_config
from semivim.models.vim import Vim
from semivim.utils.user_error import UserError
from tests.run_folder import write_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "rün 1")


def test_the_model_has_the_folders_weights_in_eval_mode(folder: Path) -> None:
    model = load_folder(folder, "run")
    assert not model.training and model.num_classes == 5
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("config.json", None, "lacks config.json"),
        ("model.safetensors", None, "lacks model.safetensors"),
        ("config.json", "{", "config.json: Expecting property name"),
        ("config.json", b"\xff\xfe\x00", "config.json: 'utf-8' codec"),
        ("config.json", "[" * 100_000, "config.json: maximum recursion"),
        ("config.json", "[1]", "config.json: wanted a mapping, got list"),
        ("config.json", "{}", "config.json lacks architecture"),
        ("config.json", {"architecture": 3}, "architecture is 3, wanted str"),
        (
            "config.json",
            {"architecture": "test_vmi"},
            "'test_vmi' is unknown to timm; did you mean .*test_vim",
        ),
        ("config.json", {"label_names": 7}, "label_names is 7, wanted list or dict"),
        ("config.json", {"label_descriptions": ["x"] * 99}, "..., wanted dict"),
        ("config.json", {"pretrained_cfg": None}, "pretrained_cfg is None, wanted dict"),
        ("config.json", {"model_args": {"num_classes": 4}}, "num_classes is 5, but 4 in model_args"),
        ("config.json", {"model_args": [1]}, r"config.json: model_args is \[1\], wanted dict"),
        ("config.json", {"model_args": {"colour": 1}}, "config.json does not suit test_vim: .*'colour'"),
        ("config.json", {"model_args": {"depth": "x"}}, "does not suit test_vim: "),
        ("config.json", {"model_args": {"patch_size": 0}}, "does not suit test_vim: "),
        (
            "config.json",
            {"model_args": {"img_size": 100_000}},
            "does not suit test_vim: the model is over .* with pos_embed",
        ),
        (
            "config.json",
            {"model_args": {"depth": 10**5}},
            "does not suit test_vim: the model is over the limit of",
        ),
        ("config.json", {"model_args": {"depth": 10**9}}, r"model_args.depth is 1000000000, wanted at most 131,072"),
        ("config.json", {"num_classes": 10**12}, r"num_classes is 1000000000000, wanted at most"),
        (
            "config.json",
            {"pretrained_cfg": {"input_size": [3, 10**5, 9]}},
            "input_size is .*at most 8192",
        ),
        ("config.json", {"pretrained_cfg": {"mean": "x"}}, "pretrained_cfg: mean is 'x', wanted numbers in"),
        ("config.json", {"pretrained_cfg": {"num_classes": "5"}}, "num_classes is '5', wanted int"),
        ("config.json", {"pretrained_cfg": {"label_offset": [1]}}, r"label_offset is \[1\], wanted int"),
        ("config.json", {"pretrained_cfg": {"first_conv": 5}}, "first_conv is 5, wanted str"),
        ("config.json", {"pretrained_cfg": {"classifier": ["a", 5]}}, r"classifier is \['a', 5\], wanted str"),
        ("config.json", {"architecture": "semivim_pico"}, "the weights do not load: Error"),
        ("model.safetensors", b"", "the weights do not load: .*header"),
        ("model.safetensors", b"\x00" * 5000, "the weights do not load: .*header"),
        ("model.safetensors", "cut", "the weights do not load: .*not fully covered"),
        ("model.safetensors", "shape", "the weights do not load: Error.* size mismatch for pos_embed"),
    ],
)
def test_what_is_wrong_is_one_line(folder: Path, name: str, content: object, cause: str) -> None:
    path = folder / name
    if content is None:
        path.unlink()
        path.mkdir()
    elif content == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    elif content == "shape":
        save_file({**load_file(path), "pos_embed": torch.ones(1, 17, 8)}, path)
    elif isinstance(content, dict):
        path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
    else:
        path.write_bytes(content if isinstance(content, bytes) else str(content).encode())
    with pytest.raises(ValueError, match=f"model: run:? .*{cause}") as caught:
        load_folder(folder, "model: run")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_config_of_any_model_of_timm(tmp_path: Path) -> None:
    timm.models.save_for_hf(timm.create_model("test_resnet"), tmp_path, safe_serialization=True)
    assert read_config(tmp_path, "model")["architecture"] == "test_resnet"
    assert load_folder(tmp_path, "model").num_classes == 1000


def test_a_first_layer_that_only_the_weights_have_is_named(tmp_path: Path) -> None:
    timm.models.save_for_hf(timm.create_model("test_vit"), tmp_path, safe_serialization=True)
    weights, config = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"]["first_conv"] = "ghost"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_folder(tmp_path, "model").num_classes == 1000  # as timm takes it
    save_file({**load_file(weights), "ghost.weight": torch.ones(1)}, weights)
    with pytest.raises(UserError, match="first_conv is 'ghost', wanted a layer of VisionTransformer with weights"):
        load_folder(tmp_path, "model")


@pytest.mark.parametrize(
    ("cfg", "tensor", "cause"),
    [
        ({"label_offset": 1, "classifier": "foo"}, "x", "label_offset is 1 .*'foo', but .* no rows of 'foo.weight'"),
        ({"label_offset": 1, "classifier": ["head", "foo"]}, "foo.weight", ".*no rows of 'foo.bias'"),
        ({"first_conv": "head_drop"}, "head_drop.weight", "first_conv is 'head_drop', wanted a layer of Vim with weig"),
    ],
)
def test_names_that_timm_would_look_for_in_vain(folder: Path, cfg: dict, tensor: str, cause: str) -> None:
    config, weights = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    config["pretrained_cfg"] |= cfg
    (folder / "config.json").write_text(json.dumps(config))
    save_file({**load_file(weights), tensor: torch.ones(3)}, weights)
    with pytest.raises(UserError, match=f"^model: config.json: pretrained_cfg: {cause}"):
        load_folder(folder, "model")


@pytest.mark.parametrize("kind", [AttributeError, TypeError, KeyError])
@pytest.mark.parametrize("where", ["everywhere", "in memory"])
def test_a_bug_inside_the_model_keeps_its_traceback(
    folder: Path, kind: type, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = Vim.__init__

    def broken(self: Vim, *args: object, **kwargs: object) -> None:
        init(self, *args, **kwargs)
        if where == "everywhere" or self.head.weight.device.type != "meta":  # on which a config is tried before
            raise kind("'Vim' object has no attribute 'typo'")

    monkeypatch.setattr(Vim, "__init__", broken)
    with pytest.raises(kind) as caught:
        load_folder(folder, "run")
    assert not isinstance(caught.value, ValueError)
