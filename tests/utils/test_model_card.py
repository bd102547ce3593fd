"""The card says what the run was, and nothing about the machine it ran on."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from semivim.utils.model_card import model_card, public_args, read_run
from tests.run_folder import write_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def card(run_dir: Path) -> str:
    return model_card(read_run(run_dir), "org/ants", "v1", "1.2.3")


def test_head_is_what_the_hub_reads(card: str) -> None:
    data = ModelCard(card).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "timm", "image-classification")
    assert "semi-supervised-learning" in data.tags


def test_data_split_recipe_and_seed(card: str) -> None:
    for text in ("split sha256: " + "ab" * 32, "split num labelled: 20", "seed: 7", "lr: 0.001", "ssl method: lyapema"):
        assert f"- {text}" in card
    assert "- epochs run: 3" in card
    assert "- semivim: 1.2.3" in card


def test_metrics_of_teacher_and_student(card: str) -> None:
    # the published weights are those of the best epoch, the run's full metrics those of the last
    assert "| metric | published | teacher, last epoch | student, last epoch |" in card
    assert "| top-1 (%) | 63.00 | 61.50 | 55.75 |" in card
    assert "| balanced accuracy (%) | - | 58.25 | 58.25 |" in card
    assert "best epoch, 1 of 0 to 2" in card


def test_recall_of_each_class_with_its_labels(card: str) -> None:
    assert "| 0 | ant | 8 | 90.00 | 90.00 |" in card
    # a name may hold the table's own sign; a class without validation images has no recall
    assert "| 1 | bee \\| wasp | 5 | 80.00 | 80.00 |" in card
    assert "| 2 | cat | 3 | - | - |" in card


def test_usage_and_command_to_reproduce(card: str) -> None:
    assert 'timm.create_model("hf-hub:org/ants@v1", pretrained=True)' in card
    assert "python train_ssl.py -c args.yaml --data-dir DATA_DIR" in card
    assert "![" in card and "(curves.png)" in card


def test_use_license_and_citations(card: str) -> None:
    for text in ("## Intended use", "## License\n\napache-2.0", "he2025semivim", "zhu2024vision", "@software{semivim"):
        assert text in card


def test_no_path_of_the_machine(card: str, run_dir: Path) -> None:
    assert "/home" not in card and str(run_dir) not in card
    args, local = public_args(
        {"data_dir": "/home/me/x", "output": "/o", "resume": "", "lr": 0.1, "x": "~/a", "labeled_list": "l.txt"}
    )
    assert args == {"lr": 0.1}
    assert local == ["data_dir", "x", "labeled_list"]


def test_missing_files_are_listed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run_dir: wanted a finished run.* lacks model.safetensors, config"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "cause"),
    [
        ("metrics.json", "{", "metrics.json: Expecting"),
        ("metrics.json", "[]", "wanted a mapping, got list"),
        ("metrics.json", json.dumps({"student": {}}), "lacks teacher, best, split"),
        ("args.yaml", "a: [", "args.yaml: while parsing"),
        ("config.json", "{}", "lacks architecture, num_classes"),
    ],
)
def test_unreadable_file_is_named(tmp_path: Path, name: str, text: str, cause: str) -> None:
    write_run(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=cause) as caught:
        read_run(tmp_path)
    assert "\n" not in str(caught.value)


def test_published_flags_are_yaml_that_the_script_reads(run_dir: Path) -> None:
    args, _ = public_args(read_run(run_dir).args)
    assert yaml.safe_load(yaml.safe_dump(args)) == args
    assert args["model"] == "test_vim" and "output" not in args
