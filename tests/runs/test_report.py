import json

import torch
from PIL import Image

from semivim.runs.report import Panel, results_table, save_curves, save_images, write_report

PANELS = [Panel("loss", ["loss_labelled"]), Panel("V", ["v", "guard_rate"], "symlog"), Panel("alpha", ["alpha"])]


def test_picture_of_nothing(tmp_path):
    save_curves(tmp_path / "curves.png", [], PANELS, "a run resumed at its end in a new folder")
    assert (tmp_path / "curves.png").exists()


def test_table_and_picture(tmp_path):
    student = {
        "top1": 10.0,
        "top5": 50.0,
        "balanced_acc": 9.0,
        "worst_class_recall": 0.0,
        "per_class_recall": [20.0, None],
    }
    columns = {"student": student, "teacher": student | {"top1": 12.5}}
    table = results_table(columns | {"student_debiased": student, "teacher_debiased": student})
    assert table.splitlines()[0].split() == ["student", "teacher", "student_debiased", "teacher_debiased"]
    assert "top1                       10.00     12.50             10.00" in table
    assert len({len(line) for line in table.splitlines()}) == 1
    assert "recall of class 0" in table
    assert "class 1" not in table
    records = [
        {"update": i, "loss_labelled": 1 / i, "v": 10.0**i, "guard_rate": 0.0, "alpha": float("nan")}
        for i in range(1, 5)
    ]
    save_curves(tmp_path / "curves.png", [*records, {"update": 4, "teacher_top1": 20.0}], PANELS, "a title")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size[0] > picture.size[1] > 100
        assert len(picture.convert("L").getcolors(256)) > 10


def test_table_names_classes_by_their_names():
    metrics = {"top1": 10.0, "per_class_recall": [20.0, None, 30.0]}
    table = results_table({"student": metrics}, ["dog\nforged", "cat"])
    assert [line.split() for line in table.splitlines()[2:]] == [
        ["recall", "of", "class", r"'dog\nforged'", "20.00"],
        ["recall", "of", "class", "2", "30.00"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1


def test_report_writes_results_and_picture_of_any_run(tmp_path):
    records = [{"update": i, "loss": 1 / i} for i in range(1, 5)]
    write_report(tmp_path, {"loss": 0.25}, records, [Panel("loss", ["loss"])], "pretraining")
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"loss": 0.25}
    assert (tmp_path / "curves.png").exists()


def test_images_stand_in_columns_under_their_titles(tmp_path):
    red, grey = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.full((2, 1, 8, 8), 128, dtype=torch.uint8)
    red[:, 0] = 255
    red = torch.cat([red, torch.zeros_like(red[:, :1])], 1)  # an alpha of 0, which hides no colour
    save_images(tmp_path / "images.png", [("red", red), ("grey", grey)])
    with Image.open(tmp_path / "images.png") as picture:
        pixels = picture.convert("RGB")
    width, height = pixels.size
    for row in (0.35, 0.75):
        assert pixels.getpixel((width // 4, int(row * height))) == (255, 0, 0)
        assert pixels.getpixel((3 * width // 4, int(row * height))) == (128, 128, 128)
    assert [path.name for path in tmp_path.iterdir()] == ["images.png"]
