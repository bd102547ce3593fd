"""Labels of an image file are those the model gives the image as evaluation prepares it."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from semivim.data import EvaluationLoader, UnreadableImageError, View, open_source
from semivim.hub.model_folder import pixel_rules
from semivim.inference import find_images, load_model, predict
from semivim.runs.checkpoint import save_model
from semivim.utils.pixels import PixelRules
from semivim.utils.user_error import UserError
from tests.run_folder import CLASSES, write_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def model(run_dir: Path) -> torch.nn.Module:
    return load_model(f"local-dir:{run_dir}")


@pytest.fixture
def photo(tmp_path: Path) -> Image.Image:
    pixels = torch.randint(0, 256, (48, 40, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def test_labels_and_probabilities(model: torch.nn.Module, photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.png")
    transform = timm.data.create_transform(**timm.data.resolve_input_data_config(model))
    with torch.inference_mode():
        wanted = model(transform(photo)[None]).softmax(-1)[0]
    torch.manual_seed(5)  # views seed with 0
    state = torch.get_rng_state()
    found = predict(model, tmp_path / "photo.png", topk=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert [share for _, share in found] == pytest.approx(wanted.sort(descending=True).values[:3].tolist())
    assert [label for label, _ in found] == [CLASSES[i] for i in wanted.argsort(descending=True)[:3]]


def test_a_turned_photo_is_seen_as_evaluation_sees_it(
    model: torch.nn.Module, photo: Image.Image, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer would turn it by 270 degrees
    (tmp_path / "validation" / "ant").mkdir(parents=True)
    path = tmp_path / "validation" / "ant" / "turned.jpg"
    photo.save(path, exif=exif)
    view = View(**timm.data.resolve_input_data_config(model), is_training=False)
    source = open_source("", str(tmp_path), "validation")
    (batch,) = EvaluationLoader(source, view, batch_size=1)
    with torch.inference_mode():
        wanted = model(batch.image).softmax(-1)[0]
    found = predict(model, path)
    assert torch.equal(torch.tensor([share for _, share in found]), wanted.sort(descending=True).values)
    photo.save(tmp_path / "plain.jpg")
    assert predict(model, tmp_path / "plain.jpg") == found


def test_any_mode(model: torch.nn.Module, photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "plain.png")
    plain = predict(model, tmp_path / "plain.png")
    photo.convert("RGBA").save(tmp_path / "alpha.png")
    assert predict(model, tmp_path / "alpha.png") == plain
    photo.convert("L").save(tmp_path / "grey.png")
    photo.convert("L").convert("RGB").save(tmp_path / "grey3.png")
    assert predict(model, tmp_path / "grey.png") == predict(model, tmp_path / "grey3.png")


def test_transparency_is_composed_on_the_background_of_training(
    model: torch.nn.Module, photo: Image.Image, tmp_path: Path
) -> None:
    clip_art = photo.convert("RGBA")
    clip_art.putalpha(Image.linear_gradient("L").resize(photo.size))
    clip_art.save(tmp_path / "clip.png")
    for colour, rules in (((255, 255, 255), ()), ((0, 80, 0), (PixelRules((0, 80, 0)),))):
        flat = Image.alpha_composite(Image.new("RGBA", photo.size, colour), clip_art).convert("RGB")
        flat.save(tmp_path / "flat.png")
        expected = predict(model, tmp_path / "flat.png", 2)
        assert predict(model, tmp_path / "clip.png", 2, *rules) == expected
        assert predict(model, tmp_path / "clip.png", 2, PixelRules((255, 0, 255))) != expected


def test_pixels_are_read_as_in_the_training_of_the_model(photo: Image.Image, tmp_path: Path) -> None:
    rules = PixelRules((200, 0, 0), 1000)
    torch.manual_seed(0)
    save_model(timm.create_model("test_vim", num_classes=5), tmp_path, None, None, rules)
    trained = load_model(f"local-dir:{tmp_path}")
    clip_art = photo.convert("RGBA")
    clip_art.putalpha(90)
    clip_art.save(tmp_path / "clip.png")
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40)).save(tmp_path / "deep.png")
    for name in ("clip.png", "deep.png"):
        assert predict(trained, tmp_path / name) == predict(trained, tmp_path / name, rules=rules)
        assert predict(trained, tmp_path / name) != predict(trained, tmp_path / name, rules=PixelRules())


@pytest.mark.parametrize(
    "rules",
    [
        3,
        {},
        {"alpha_background": [1, 2, 999], "max_value": None},
        {"alpha_background": [1, 2, 3, 4], "max_value": None},
        {"alpha_background": [1, 2, 3], "max_value": -1},
    ],
)
def test_damaged_pixel_rules_are_named(rules: object, tmp_path: Path) -> None:
    write_run(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"semivim_pixel_rules": rules}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="config.json: semivim_pixel_rules is .*, wanted alpha_background, "):
        load_model(f"local-dir:{tmp_path}")


def test_pixel_rules_for_another_number_of_channels_are_named(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.png")
    for channels, rules, does in ((3, PixelRules(None), "keeps"), (4, PixelRules(), "drops")):
        save_model(timm.create_model("test_vim", num_classes=5, in_chans=channels), tmp_path, None, None, rules)
        model = load_model(f"local-dir:{tmp_path}")
        said = f"config.json {does} alpha, but the model takes {channels} channels"
        with pytest.raises(UserError, match=f"^--model: {said}$"):
            predict(model, tmp_path / "photo.png")
        with pytest.raises(UserError, match=f"^--model NAME: {said}$"):
            pixel_rules(model, "--model NAME")


def test_a_folder_stands_for_the_images_below_it(photo: Image.Image, tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("in/b.png", "in/deep/ä.png", "one.png"):
        photo.save(tmp_path / name)
    (tmp_path / "in" / "notes.txt").write_text("no image")
    one, folder = str(tmp_path / "one.png"), str(tmp_path / "in")
    assert find_images([one, folder, "/no/such"]) == [one, f"{folder}/b.png", f"{folder}/deep/ä.png", "/no/such"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty' holds no image"):
        find_images([str(tmp_path / "empty")])


def test_one_channel_model(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.png")
    grey = timm.create_model("test_vim", num_classes=3, in_chans=1).eval()
    assert {label for label, _ in predict(grey, tmp_path / "photo.png", topk=3)} == {"class 0", "class 1", "class 2"}


def test_imagenet_names(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.png")
    imagenet = timm.create_model("test_vim").eval()
    with torch.no_grad():
        imagenet.head.bias[281] = 50.0
    assert predict(imagenet, tmp_path / "photo.png", topk=1)[0][0].startswith("tabby")


def test_unreadable_image(
    model: torch.nn.Module, photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "photo.png"
    with pytest.raises(UnreadableImageError, match=r"photo.png is unreadable: .*No such file"):
        predict(model, path)
    photo.save(path)
    data = path.read_bytes()
    for damaged in (b"", b"not an image", data[: len(data) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(UnreadableImageError, match=r"photo.png is unreadable") as caught:
            predict(model, path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UnreadableImageError, match="Is a directory"):
        predict(model, tmp_path)
    path.write_bytes(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnreadableImageError, match=r"photo.png is unreadable: .*decompression bomb"):
        predict(model, path)


def test_five_labels_or_all_of_fewer(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.png")
    for num_classes, wanted in ((3, 3), (7, 5)):
        found = predict(timm.create_model("test_vim", num_classes=num_classes).eval(), tmp_path / "photo.png")
        assert len(found) == wanted


@pytest.mark.parametrize("topk", [0, 6])
def test_topk_out_of_range(model: torch.nn.Module, tmp_path: Path, topk: int) -> None:
    with pytest.raises(ValueError, match=f"--topk: wanted 1 to 5, got {topk}"):
        predict(model, tmp_path / "photo.png", topk=topk)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"interpolation": "sharp"}, "^--model: interpolation is 'sharp', wanted a name such as bicubic"),
        ({"mean": []}, r"^--model: mean is \[\], wanted numbers in \[0, 1\], one for each channel"),
        ({"crop_pct": 1e-3}, "^--model: images would have a side of 32000 pixels"),
        ({"num_classes": 0}, "it has 0 classes, wanted a classifier"),
    ],
)
def test_what_cannot_label_an_image_is_named(photo: Image.Image, tmp_path: Path, change: dict, cause: str) -> None:
    photo.save(tmp_path / "photo.png")
    odd = timm.create_model("test_vim", num_classes=change.pop("num_classes", 3)).eval()
    odd.pretrained_cfg.update(change)
    with pytest.raises(ValueError, match=cause):
        predict(odd, tmp_path / "photo.png", topk=1)


@pytest.mark.parametrize("kind", [KeyError, ValueError, OSError])
def test_a_bug_while_preparing_keeps_its_traceback(
    model: torch.nn.Module, photo: Image.Image, tmp_path: Path, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise kind("a bug")

    photo.save(tmp_path / "photo.png")
    monkeypatch.setattr(View, "load", broken)
    with pytest.raises(kind, match="a bug") as caught:
        predict(model, tmp_path / "photo.png")
    assert not isinstance(caught.value, UserError)


def test_label_names_by_number_and_descriptions(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.png")
    write_run(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["label_names"] = {str(i): name for i, name in enumerate(CLASSES)}
    config["label_descriptions"] = {"ant": "an ant"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    labels = {label for label, _ in predict(load_model(f"local-dir:{tmp_path}"), tmp_path / "photo.png")}
    assert labels == {"an ant", *CLASSES[1:]}
    other = timm.create_model("test_vim", num_classes=3).eval()
    other.pretrained_cfg["label_names"] = CLASSES  # of other weights
    assert predict(other, tmp_path / "photo.png", topk=1)[0][0].startswith("class ")


def test_checkpoint_with_the_teacher_of_a_training_run(run_dir: Path, tmp_path: Path) -> None:
    teacher = load_file(run_dir / "model.safetensors")
    student = {name: value + 1 for name, value in teacher.items()}
    torch.save({"state_dict": student, "state_dict_ema": teacher}, tmp_path / "last.pth.tar")
    model = load_model("test_vim", checkpoint=str(tmp_path / "last.pth.tar"), num_classes=5)
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, teacher[name]), name


def test_a_file_of_weights_alone(run_dir: Path, tmp_path: Path) -> None:
    weights = load_file(run_dir / "model.safetensors")
    torch.save({f"module.{name}": value for name, value in weights.items()}, tmp_path / "weights.pth")
    torch.save({"model": weights, "model_ema": None}, tmp_path / "model.pth")
    for file in (run_dir / "model.safetensors", tmp_path / "weights.pth", tmp_path / "model.pth"):
        loaded = load_model("test_vim", checkpoint=str(file), num_classes=5).state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in loaded.items())


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("none.pth", None, "No such file"),
        ("none.safetensors", None, "No such file"),
        ("empty.pth", b"", "not a readable torch file"),
        ("short.pth", b"PK", "not a readable torch file"),
        ("text.pth", b"some text", "not a readable torch file"),
        ("text.safetensors", b"some text", "not a readable safetensors file: .*header too large"),
        ("list.pth", [1, 2], "holds a list"),
        ("int.pth", 7, "holds a int"),
        ("folder.safetensors", "folder", "Is a directory"),
        ("epoch.pth", {"epoch": 3}, "state dict: wanted tensors by name, got int under 'epoch'"),
        ("model.pth", {"model": 3}, "model: wanted a dict of tensors, got int"),
        ("shape.pth", {"model": {"pos_embed": torch.ones(3)}}, "pos_embed has shape .3,., wanted .1, patches . 1, 32."),
        ("keys.pth", {1: torch.ones(1)}, "got Tensor under 1"),
        ("folder.pth", "folder", "Is a directory"),
    ],
)
def test_a_bad_checkpoint_is_one_line(tmp_path: Path, name: str, content: object, cause: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "folder":
        path.mkdir()
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=f"{name} .*{cause}") as caught:
        load_model("test_vim", checkpoint=str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("num_classes", "cause"),
    [
        (4, "does not load into test_vim: .*size mismatch for head"),
        (10**30, "--num-classes: 10+ does not suit test_vim: .*Overflow"),
    ],
)
def test_a_checkpoint_of_other_classes_is_one_line(run_dir: Path, num_classes: int, cause: str) -> None:
    with pytest.raises(ValueError, match=cause) as caught:
        load_model("test_vim", checkpoint=str(run_dir / "model.safetensors"), num_classes=num_classes)
    assert "\n" not in str(caught.value)


def test_damaged_weights_are_no_labels(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.png")
    damaged = timm.create_model("test_vim", num_classes=3).eval()
    with torch.no_grad():
        damaged.head.bias[1] = torch.nan
    with pytest.raises(ValueError, match=r"model: its logits of .*photo.png are not finite"):
        predict(damaged, tmp_path / "photo.png", topk=1)


@pytest.mark.parametrize(
    ("name", "options", "cause"),
    [
        ("test_vmi", {"pretrained": True}, "got 'test_vmi'; did you mean .*test_vim"),
        ("test_vim", {}, "needs weights, wanted either --pretrained or --checkpoint"),
        ("test_vim", {"pretrained": True}, "no pretrained weights exist for test_vim"),
        ("test_vim.nope", {"pretrained": True}, r"test_vim.nope: Invalid pretrained tag \(nope\)"),
        ("hf-hub:alone", {}, "^hf-hub: wanted org/name, got 'alone'"),
        ("hf-hub:org/bad name", {}, "^hf-hub: wanted org/name, got 'org/bad name'"),
        ("hf-hub:org/name", {"pretrained": True}, "has its own weights"),
        ("local-dir:/no/such", {"num_classes": 3}, "has its own weights"),
        ("vim_tiny_patch16_224", {"pretrained": True, "num_classes": 3}, "--num-classes: 3 goes with --checkpoint"),
        ("local-dir:/no/such", {}, "local-dir:/no/such lacks config.json, model.safetensors"),
    ],
)
def test_model_errors(name: str, options: dict, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        load_model(name, **options)
