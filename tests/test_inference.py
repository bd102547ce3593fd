"""Labels of an image file are those the model gives the image as timm prepares it."""

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from semivim.inference import load_model, predict
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
    found = predict(model, tmp_path / "photo.png", topk=3)
    assert [share for _, share in found] == pytest.approx(wanted.sort(descending=True).values[:3].tolist())
    assert [label for label, _ in found] == [CLASSES[i] for i in wanted.argsort(descending=True)[:3]]


def test_any_mode_and_orientation(model: torch.nn.Module, photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "plain.png")
    turned = photo.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # the viewer has to turn it by 270 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    plain = predict(model, tmp_path / "plain.png")
    assert predict(model, tmp_path / "turned.png") == plain
    photo.convert("RGBA").save(tmp_path / "alpha.png")
    assert predict(model, tmp_path / "alpha.png") == plain
    photo.convert("L").save(tmp_path / "grey.png")
    photo.convert("L").convert("RGB").save(tmp_path / "grey3.png")
    assert predict(model, tmp_path / "grey.png") == predict(model, tmp_path / "grey3.png")


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
    with pytest.raises(ValueError, match="image: no such file: .*photo.png"):
        predict(model, path)
    photo.save(path)
    data = path.read_bytes()
    for damaged in (b"", b"not an image", data[: len(data) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="image: cannot read .*photo.png") as caught:
            predict(model, path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="image: cannot read"):
        predict(model, tmp_path)
    path.write_bytes(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="image: cannot read .*decompression bomb"):
        predict(model, path)


@pytest.mark.parametrize("topk", [0, 6])
def test_topk_out_of_range(model: torch.nn.Module, tmp_path: Path, topk: int) -> None:
    with pytest.raises(ValueError, match=f"topk: wanted 1 to 5, got {topk}"):
        predict(model, tmp_path / "photo.png", topk=topk)


def test_checkpoint_with_the_teacher_of_a_training_run(run_dir: Path, tmp_path: Path) -> None:
    teacher = load_file(run_dir / "model.safetensors")
    student = {name: value + 1 for name, value in teacher.items()}
    torch.save({"state_dict": student, "state_dict_ema": teacher}, tmp_path / "last.pth.tar")
    model = load_model("test_vim", checkpoint=str(tmp_path / "last.pth.tar"), num_classes=5)
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, teacher[name]), name


def test_checkpoint_errors(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint: no such file"):
        load_model("test_vim", checkpoint=str(tmp_path / "none.pth"))
    with pytest.raises(ValueError, match=r"checkpoint: .* does not load into test_vim: .*size mismatch"):
        load_model("test_vim", checkpoint=str(run_dir / "model.safetensors"), num_classes=4)
    for damaged in (b"", b"PK", b"some text"):
        (tmp_path / "cut.pth").write_bytes(damaged)
        with pytest.raises(ValueError, match="checkpoint: .*cut.pth does not load"):
            load_model("test_vim", checkpoint=str(tmp_path / "cut.pth"))


@pytest.mark.parametrize(
    ("name", "options", "cause"),
    [
        ("test_vmi", {"pretrained": True}, "got 'test_vmi'; nearest: .*test_vim"),
        ("test_vim", {}, "needs weights, wanted either pretrained or a checkpoint"),
        ("test_vim", {"pretrained": True}, "no pretrained weights exist for test_vim"),
        ("hf-hub:alone", {}, r"wanted hf-hub:org/name\[@revision\], got hf-hub:alone"),
        ("hf-hub:org/name", {"pretrained": True}, "has its own weights"),
        ("local-dir:/no/such", {}, "folder /no/such lacks config.json, model.safetensors"),
    ],
)
def test_model_errors(name: str, options: dict, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        load_model(name, **options)
