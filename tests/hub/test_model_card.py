"""The card says what the run was, and nothing about the machine it ran on."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from semivim.hub.model_card import model_card, public_args, public_config, public_license, read_run
from semivim.utils.user_error import UserError
from tests.hub.test_markdown import ACTIVE, html_tags
from tests.run_folder import write_run

_SPLIT = {"num_labelled": 5, "num_unlabelled": 5, "labels_per_class": [1] * 5}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def card(run_dir: Path) -> str:
    return model_card(read_run(run_dir), "org/ants", "v1", "1.2.3", "cc-by-4.0")


def test_head_is_what_the_hub_reads(card: str) -> None:
    data = ModelCard(card).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("cc-by-4.0", "timm", "image-classification")
    assert "semi-supervised-learning" in data.tags


def test_hub_shows_the_metrics_of_the_published_weights(card: str) -> None:
    data = ModelCard(card).data
    assert data.model_name == "ants"
    (result,) = data.eval_results  # the run's best epoch has top-1 only
    assert (result.task_type, result.metric_type, result.metric_value) == ("image-classification", "accuracy", 63.0)
    assert (result.dataset_name, result.dataset_split) == ("a folder of images", "validation")


def test_a_data_set_with_a_place_of_the_machine_is_not_named(tmp_path: Path) -> None:
    write_run(tmp_path)
    for dataset, shown in (("hfds//home/me/set", "a folder of images"), ("torch/cifar10", "torch/cifar10")):
        (tmp_path / "args.yaml").write_text(yaml.safe_dump({"dataset": dataset}))
        card = model_card(read_run(tmp_path), "org/ants", "", "1.2.3", None)
        assert "/home" not in card
        assert f"- data: {shown}\n" in card
        assert ModelCard(card).data.eval_results[0].dataset_name == shown


def test_data_split_recipe_and_seed(card: str) -> None:
    for text in ("split sha256: " + "ab" * 32, "split num labelled: 20", "seed: 7", "lr: 0.001", "ssl method: lyapema"):
        assert f"- {text}" in card
    assert "- epochs run: 3" in card
    assert "- semivim: 1.2.3" in card


@pytest.mark.parametrize(
    ("colour", "shown"), [([10, 100, 0], "&#35;0a6400"), (None, "none, alpha is the fourth channel")]
)
def test_what_becomes_of_transparency_is_told(tmp_path: Path, colour: list[int] | None, shown: str) -> None:
    write_run(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["semivim_pixel_rules"] = {"alpha_background": colour, "max_value": 1023}
    (tmp_path / "config.json").write_text(json.dumps(config))
    card = model_card(read_run(tmp_path), "org/ants", "", "1.2.3", None)
    assert f"- alpha background: {shown}\n- max value: 1023\n" in card


def test_metrics_of_teacher_and_student(card: str) -> None:
    # the published weights are those of the best epoch, the run's full metrics those of the last
    assert "| metric | published | teacher, last epoch | student, last epoch |" in card
    assert "| top-1 (%) | 63.00 | 61.50 | 55.75 |" in card
    assert "| balanced accuracy (%) | - | 58.25 | 58.25 |" in card
    assert "The weights are those of the student at epoch 1 of 0 to 2, the best of student and teacher" in card
    assert "on the validation split by top-1 (%)." in card
    assert '"published" is the student at epoch 1.' in card


def test_recall_of_each_class_with_its_labels(card: str) -> None:
    assert "| 0 | ant | 8 | 90.00 | 90.00 |" in card
    # a name may hold the table's own sign; a class without validation images has no recall
    assert "| 1 | bee &#124; wasp | 5 | 80.00 | 80.00 |" in card
    assert "| 2 | cat | 3 | - | - |" in card


def test_usage_and_command_to_reproduce(card: str) -> None:
    assert 'timm.create_model("hf-hub:org/ants@v1", pretrained=True)' in card
    assert "python train_ssl.py -c args.yaml --data-dir DATA_DIR" in card
    assert "![" in card and "(curves.png)" in card


def test_use_license_and_citations(card: str) -> None:
    for text in ("## Intended use", "## License\n\ncc-by-4.0", "he2025semivim", "zhu2024vision", "@software{semivim"):
        assert text in card


def test_no_path_of_the_machine(card: str, run_dir: Path) -> None:
    assert "/home" not in card and str(run_dir) not in card
    places = {
        "data_dir": "/home/me/x",
        "x": "~/a",
        "labeled_list": "l.txt",
        "model": "local-dir:/home/me/run",
        "y": "local-dir:run",
        "dataset": "hfds//home/me/set",
        "model_kwargs": {"depth": 2, "pretrained_cfg_overlay": {"file": "/home/me/w.pth"}},
        "class_map": "names.txt",
        "places": [1, "/home/me/x"],
    }
    public = {"lr": 0.1, "dataset2": "torch/cifar10", "z": "hf-hub:org/name@v1", "scale": [0.1, 1.0], "bce": None}
    args, local = public_args({**places, **public, "output": "/o", "resume": ""})
    assert args == public
    assert local == list(places)


def test_license_is_the_one_given_or_that_of_the_weights_the_run_began_with(tmp_path: Path) -> None:
    write_run(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    base = {"license": "cc-by-nc-4.0", "description": "a start; not semi-supervised", "tag": "vim_in1k"}
    config["pretrained_cfg"].update(base)
    (tmp_path / "config.json").write_text(json.dumps(config))
    for pretrained, given, wanted in (
        (False, None, None),
        (True, None, "cc-by-nc-4.0"),
        (True, "mit", "mit"),
        (False, "mit", "mit"),
    ):
        (tmp_path / "args.yaml").write_text(yaml.safe_dump({"pretrained": pretrained}))
        run = read_run(tmp_path)
        license_id = public_license(run, given)
        card = model_card(run, "org/ants", "v1", "1.2.3", license_id)
        assert license_id == ModelCard(card).data.license == wanted
        assert ("None is stated for the weights" in card) == (wanted is None)
        assert not set(base) - {"license"} & set(public_config(run, license_id)["pretrained_cfg"])
        assert public_config(run, license_id)["pretrained_cfg"].get("license") == wanted


def test_unlabelled_images_that_taught_nothing_are_told(tmp_path: Path) -> None:
    write_run(tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    metrics["pseudo_labels"] = {"seen": 9, "kept": 0, "fault": "no unlabelled image was kept"}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    card = model_card(read_run(tmp_path), "org/ants", "", "1.2.3", None)
    assert "20 labelled images and 300 unlabelled ones (but no unlabelled image was kept)." in card


def test_a_license_that_is_none_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"]["license"] = "[free](http://evil)"
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "args.yaml").write_text("pretrained: true")
    with pytest.raises(ValueError, match=r"config.json: license \(give --license\): wanted an identifier.*got '\[free"):
        public_license(read_run(tmp_path), None)
    assert public_license(read_run(tmp_path), "mit") == "mit"


@pytest.mark.parametrize("evil", ACTIVE, ids=ascii)
def test_foreign_text_does_nothing_in_the_card(evil: str, tmp_path: Path) -> None:
    """Whatever a field may hold, the page has the tags that it has with a harmless word there, and the head is read."""

    def tags(text: str) -> set[str]:
        write_run(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["label_names"][2] = config["architecture"] = text
        (tmp_path / "config.json").write_text(json.dumps(config))
        flags = {"dataset": text, "opt": text, "seed": [text], "eval_metric": text, "ssl_method": text}
        (tmp_path / "args.yaml").write_text(yaml.safe_dump(flags))
        card = model_card(read_run(tmp_path), "org/ants", "v1", "1.2.3", "mit")
        data = ModelCard(card).data
        assert (data.model_name, data.license) == ("ants", "mit")
        return set(html_tags(card.split("\n---\n", 1)[1]))

    assert tags(evil) == tags("harmless")


def test_missing_files_are_listed(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^run folder .* lacks model.safetensors, config.*: wanted that of a finished run"
    ):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "cause"),
    [
        ("metrics.json", "{", "metrics.json: Expecting"),
        ("metrics.json", "[]", "wanted a mapping, got list"),
        ("metrics.json", {"teacher": None}, "metrics.json: wanted a mapping teacher, got NoneType"),
        ("metrics.json", {"best": {}}, "metrics.json: best lacks epoch"),
        ("metrics.json", {"best": {"epoch": 1, "model": "x"}}, "wanted teacher or .* as best.model, got 'x'"),
        ("metrics.json", {"split": {"sha256": ""}}, "split lacks num_labelled, num_unlabelled, labels_per_class"),
        ("metrics.json", {"student": {"per_class_recall": [1.0]}}, "wanted a list of 5 .* student.per_class_recall"),
        ("metrics.json", {"best": {"epoch": 1, "top1": [1]}}, r"wanted a number as best.top1, got \[1\]"),
        ("metrics.json", {"teacher": {"per_class_recall": ["a"] * 5}}, "wanted a list of 5 numbers"),
        ("metrics.json", {"split": {"sha256": "x", **_SPLIT}}, "split.sha256 is 'x', wanted"),
        ("metrics.json", {"best": {"epoch": "[x](y)"}}, r"best.epoch is '\[x\]\(y\)', wanted"),
        ("args.yaml", "a: [", "args.yaml: while parsing"),
        ("args.yaml", '"x\\n```": 1', r"args.yaml: wanted names of flags, got 'x\\n```'"),
        ("config.json", "{}", "lacks architecture"),
        ("config.json", '{"architecture": "test_vim"}', "lacks num_classes"),
        ("config.json", {"num_classes": 4}, "config.json: wanted 4 label_names, got .'ant'"),
        (
            "config.json",
            {"num_classes": 4, "label_names": list("abcd")},
            "a list of 4 numbers, one a class, as student.per_class_recall, got",
        ),
        ("summary.csv", b"\xff\xfe", "summary.csv: 'utf-8' codec"),
        ("summary.csv", "epoch\n" + "9" * 200_000, "summary.csv: field larger"),
    ],
    ids=str,
)
def test_unreadable_file_is_named(tmp_path: Path, name: str, text: object, cause: str) -> None:
    write_run(tmp_path)
    path = tmp_path / name
    if isinstance(text, dict):
        text = json.dumps({**json.loads(path.read_text()), **text})
    path.write_bytes(text if isinstance(text, bytes) else str(text).encode())
    with pytest.raises(ValueError, match=cause) as caught:
        read_run(tmp_path)
    assert "\n" not in str(caught.value) and "run folder " in str(caught.value)


def test_published_flags_are_yaml_that_the_script_reads(run_dir: Path) -> None:
    args, _ = public_args(read_run(run_dir).args)
    assert yaml.safe_load(yaml.safe_dump(args)) == args
    assert args["model"] == "test_vim" and "output" not in args


def test_pseudo_labels_and_debiased_models_have_columns(tmp_path: Path) -> None:
    write_run(tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    metrics["teacher_debiased"] = {**metrics["teacher"], "balanced_acc": 66.5}
    metrics["pseudo_labels"] = {"recall": [99.0, 71.5, None, 0.0, 3.25], "precision": [50.0, 60.0, None, None, 100.0]}
    metrics["pseudo_labels"]["means"] = {"kept_share_few": 0.25, "prior_kl": 0.125}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    args = yaml.safe_load((tmp_path / "args.yaml").read_text()) | {"debias_pseudo": 1.0}
    (tmp_path / "args.yaml").write_text(yaml.safe_dump(args))
    card = model_card(read_run(tmp_path), "org/ants", "", "1.2.3", None)
    assert "| student, last epoch | teacher with a prior removed |" in card
    assert "| balanced accuracy (%) | - | 58.25 | 58.25 | 66.50 |" in card
    assert "| pseudo-labels, recall (%) | pseudo-labels, precision (%) |" in card
    assert "| 71.50 | 60.00 |" in card
    assert "- debias pseudo: 1.0" in card
    assert "- pseudo-labels, kept share few: 0.25\n- pseudo-labels, prior kl: 0.12\n" in card
    for means in ("much", {"[a](b)": 1.0}, {"prior_kl": "much"}):
        (tmp_path / "metrics.json").write_text(json.dumps(metrics | {"pseudo_labels": {"means": means}}))
        with pytest.raises(UserError, match=r"wanted names and numbers as pseudo_labels\.means, got"):
            read_run(tmp_path)
    metrics["pseudo_labels"]["recall"] = [1.0]
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(UserError, match=r"wanted a list of 5 numbers, one a class, as pseudo_labels\.recall"):
        read_run(tmp_path)
