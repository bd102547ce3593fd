"""`semivim publish` and `semivim predict`, as typed."""

import csv
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import timm
from PIL import Image

from semivim.cli import main
from tests.hub_client import shared_client, shared_hub
from tests.hub_server import Fault
from tests.released import as_bytes, released_weights
from tests.run_folder import CLASSES, write_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("run"))
    Image.new("RGB", (40, 30), "teal").save(folder / "photo.png")
    return folder


def test_publish_then_predict(run_dir: Path) -> None:
    published = shared_client().cli("publish", run_dir, "--repo", "org/cli", "--tag", "v1", "--private")
    assert published.result == 0, published.stderr
    assert published.stdout.startswith(f"published to {shared_hub().url}/org/cli, commit ")
    assert 'timm.create_model("hf-hub:org/cli@v1", pretrained=True)' in published.stdout
    assert published.stderr == ""
    shared_hub().add("org/cli", {"config.json": b"{}"})  # what comes after the tag must not matter
    hub = shared_client().cli("predict", run_dir / "photo.png", "--model", "hf-hub:org/cli@v1", "--topk", 2)
    folder = shared_client().cli("predict", run_dir / "photo.png", "--model", f"local-dir:{run_dir}", "--topk", 2)
    assert hub.stdout == folder.stdout != ""


def test_predict_with_pretrained_weights(run_dir: Path) -> None:
    weights = released_weights(timm.create_model("vim_tiny_patch16_224"))
    weights["head.bias"][281] = 50.0
    shared_hub().add("hustvl/Vim-tiny-midclstok", {"vim_t_midclstok_76p1acc.pth": as_bytes({"model": weights})})
    argv = ("predict", run_dir / "photo.png", "--model", "vim_tiny_patch16_224", "--pretrained", "--topk", 1)
    answer = shared_client().cli(*argv)
    assert answer.stdout == "100.00 %  tabby, tabby cat\n", answer.stderr
    try:
        shared_hub().fault = Fault("GET /cdn", "corrupt")
        shared_hub().add("hustvl/Vim-tiny-midclstok", {"vim_t_midclstok_76p1acc.pth": as_bytes({"model": {}})})
        assert "hustvl/Vim-tiny-midclstok: vim_t_midclstok_76p1acc.pth: checksum" in shared_client().cli(*argv).line
    finally:
        shared_hub().fault = None


def test_predict_prints_labels_with_their_share(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    main(["predict", str(run_dir / "photo.png"), "--model", f"local-dir:{run_dir}"])
    lines = [line.split(" %  ") for line in capsys.readouterr().out.splitlines()]
    assert {label for _, label in lines} == set(CLASSES)
    assert sum(float(share) for share, _ in lines) == pytest.approx(100, abs=0.1)


def test_predict_takes_the_rules_for_pixels_of_training(
    tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    Image.new("RGBA", (40, 30), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("I;16", (40, 30), 700).save(tmp_path / "deep.png")

    def labels(*words: str) -> str:
        main(["predict", "--model", f"local-dir:{run_dir}", *words])
        return capsys.readouterr().out

    for name, words, colour in (
        ("clear", (), (255, 255, 255)),
        ("clear", ("--alpha-background", "#0a6400"), (10, 100, 0)),
        ("deep", ("--max-value", "1023"), (175, 175, 175)),
    ):
        Image.new("RGB", (40, 30), colour).save(tmp_path / "flat.png")
        assert labels(str(tmp_path / f"{name}.png"), *words) == labels(str(tmp_path / "flat.png"))

    # a model that says how its images were read is followed, but for a flag
    config = json.loads((run_dir / "config.json").read_text())
    stated = {"semivim_pixel_rules": {"alpha_background": [10, 100, 0], "max_value": 1023}}
    (run_dir / "config.json").write_text(json.dumps(config | stated))
    for name, words, colour in (
        ("clear", (), (10, 100, 0)),
        ("clear", ("--alpha-background", "white"), (255, 255, 255)),
        ("deep", (), (175, 175, 175)),
        ("deep", ("--max-value", "2047"), (87, 87, 87)),
    ):
        Image.new("RGB", (40, 30), colour).save(tmp_path / "flat.png")
        assert labels(str(tmp_path / f"{name}.png"), *words) == labels(str(tmp_path / "flat.png"))
    (run_dir / "config.json").write_text(json.dumps(config))


def test_predict_labels_what_it_can_read_and_fails_at_the_end(
    tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.png", "in/c.png"):
        Image.new("RGB", (40, 30), "teal").save(tmp_path / name)
    (tmp_path / "in" / "b.png").write_bytes(b"not an image")
    images = [str(tmp_path / name) for name in ("a.png", "no.png", "in")]
    argv = ["predict", *images, "--model", f"local-dir:{run_dir}", "--topk", "1"]
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[::2] == [f"{images[0]}:", f"{images[2]}/c.png:"] and lines[1] == lines[3] and " %  " in lines[1]
    errors = printed.err.splitlines()
    assert [error.partition(" is unreadable")[0] for error in errors] == [
        f"semivim: error: {path}" for path in (images[1], f"{images[2]}/b.png")
    ]
    (tmp_path / "in" / "b.png").unlink()
    main([word for word in argv if word != images[1]])
    assert capsys.readouterr().err == ""


def test_predict_takes_a_run_folder_and_prints_tables(
    tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in ("a, b.png", "c.png"):
        Image.new("RGB", (40, 30), "teal").save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    argv = ["predict", *(str(tmp_path / name) for name in ("a, b.png", "broken.png", "c.png")), "--model", str(run_dir)]

    def printed(form: str) -> str:
        with pytest.raises(SystemExit):
            main([*argv, "--format", form])
        captured = capsys.readouterr()
        assert captured.err.startswith("semivim: error: ") and "broken.png" in captured.err
        return captured.out

    rows = list(csv.DictReader(printed("csv").splitlines()))
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4", "5"] * 2
    assert {row["label"] for row in rows} == set(CLASSES)
    assert rows[0]["image"] == str(tmp_path / "a, b.png")
    assert sum(float(row["probability"]) for row in rows) == pytest.approx(2)
    first, second = json.loads(printed("json"))
    assert (first["image"], second["image"]) == (str(tmp_path / "a, b.png"), str(tmp_path / "c.png"))
    assert [label["label"] for label in first["labels"]] == [row["label"] for row in rows[:5]]
    with pytest.raises(SystemExit):
        main([*argv[:2], str(tmp_path / "broken.png"), *argv[4:], "--format", "json"])
    assert len(json.loads(capsys.readouterr().out)) == 1


def test_predict_prints_to_an_ascii_terminal(tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    config["label_names"] = ["Käfer", "猫", *CLASSES[2:]]
    (folder / "config.json").write_text(json.dumps(config))
    for encoding, cat in (("ascii", rb"\u732b"), ("cp1252", rb"\u732b"), ("utf-8", "猫".encode())):
        written = io.BytesIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
            main(["predict", str(run_dir / "photo.png"), "--model", str(folder)])
            sys.stdout.flush()
            assert cat in written.getvalue()


def test_dry_run_prints_files_and_card(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    main(["publish", str(run_dir), "--repo", "org/name", "--dry-run"])
    out = capsys.readouterr().out
    assert out.startswith("would publish to ") and "  model.safetensors (" in out
    assert "## Intended use" in out


@pytest.mark.parametrize(
    ("argv", "cause"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["publish", "RUN"], "the following arguments are required: --repo"),
        (
            ["publish", "/no/such", "--repo", "org/name"],
            "run folder /no/such lacks model.safetensors, config.json, ",
        ),
        (["publish", "RUNX", "--repo", "org/name"], "did you mean RUN?"),
        (["predict", "RUN/phto.png", "--model", "RUN"], "did you mean RUN/photo.png?"),
        (["predict", "RUN/photo.png", "--model", "RUNX"], "did you mean RUN?"),
        (["predict", "RUN/photo.png", "--model", "local-dir:RUNX"], "did you mean RUN?"),
        (["publish", "RUN", "--repo", "alone"], "--repo: wanted org/name, got 'alone'"),
        (["publish", "RUN", "--repo", "org/name", "--dry-run", "--privte"], "unrecognized arguments: --privte"),
        (["predict", "/no/such.png", "--model", "local-dir:RUN"], "/no/such.png is unreadable: "),
        (["predict", "RUN/no/such", "RUN", "--model", "local-dir:RUN", "--topk", "9"], "--topk: wanted 1 to 5, got 9"),
        (["publish", "RUN", "--repo", "org/name", "--dry-run", "--tag", "bad tag~"], "got 'bad tag~'"),
        (["publish", "RUN", "--repo", "org/name", "--dry-run", "--license", "GPL 3"], "license: wanted an identifier"),
        (["predict", "RUN/photo.png", "--model", "test_vmi", "--pretrained"], "did you mean "),
        (["predict", "RUN/photo.png", "--model", "local-dir:RUN", "--topk", "0"], "0 is not a whole number >= 1"),
        (["predict", "RUN/photo.png", "--model", "local-dir:RUN", "--topk", "9"], "--topk: wanted 1 to 5, got 9"),
        (["predict", "x", "--model", "y", "--pretrained", "--checkpoint", "z"], "not allowed with argument"),
    ],
)
def test_mistake_is_one_line_and_status_2(
    argv: list[str], cause: str, run_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([word.replace("RUN", str(run_dir)) for word in argv])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("semivim") and cause.replace("RUN", str(run_dir)) in error
    assert error.count("\n") == 1


def test_what_the_disk_refuses_is_one_line(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/no/such")
    with pytest.raises(SystemExit):
        main(["publish", str(run_dir), "--repo", "org/name", "--dry-run"])
    error = capsys.readouterr().err
    assert "No such file or directory: '/no/such/" in error and error.count("\n") == 1


def test_license_reaches_the_card(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    main(["publish", str(run_dir), "--repo", "org/name", "--dry-run", "--license", "cc-by-4.0"])
    assert "license: cc-by-4.0" in capsys.readouterr().out
