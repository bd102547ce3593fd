import os
import sys

import pytest
import timm
import torch
from PIL import Image

from semivim.timm_script import main

# As timm's scripts are written: models by name from the registry, a parser of their own, a module beside the script.
SCRIPT = """
import argparse
import timm
import beside

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("--model", default="resnet18")
    args = parser.parse_args()
    model = timm.create_model(args.model, num_classes=3)
    print(args.data, type(model).__name__, beside.NAME, __name__)

if __name__ == "__main__":
    main()
"""


@pytest.fixture(autouse=True)
def _command_line_restored(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.setattr(sys, "path", sys.path.copy())


def test_a_script_finds_the_models_and_its_own_words(tmp_path, capsys):
    (tmp_path / "validate.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text("NAME = 'beside'")
    main([str(tmp_path / "validate.py"), "data", "--model", "test_vim"])
    assert capsys.readouterr().out == "data Vim beside __main__\n"


@pytest.mark.parametrize(("words", "got"), [([], "none"), (["nowhere.py", "x"], "nowhere.py")])
def test_a_script_that_is_not_there_is_one_line(words, got, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith(f"wanted the path of a script of timm and its arguments, got {got}")
    )


WEIGHTS = "--num-classes 2 --checkpoint OUT/w.pth"
REAL = os.environ.get("SEMIVIM_TIMM_SCRIPTS", "")


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="SEMIVIM_TIMM_SCRIPTS names the folder of timm's scripts")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "words",
    [
        "validate.py DATA --split validation --model test_vim WEIGHTS -b 2 -j 0 --device cpu",
        "inference.py DATA --model test_vim WEIGHTS -b 2 -j 0 --device cpu --results-dir OUT",
        "benchmark.py --model test_vim --bench inference -b 2 --num-bench-iter 10 --num-warm-iter 1 --device cpu",
        "onnx_export.py OUT/model.onnx --model test_vim WEIGHTS --dynamo",
    ],
    ids=lambda words: words.split()[0],
)
def test_timms_own_scripts_run(words, tmp_path, monkeypatch):
    for name in ("cat", "dog"):
        (tmp_path / "data" / "validation" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (40, 40), (i, 9, 9)).save(tmp_path / "data" / "validation" / name / f"{name}{i}.png")
    (tmp_path / "out").mkdir()
    torch.save(timm.create_model("test_vim", num_classes=2).state_dict(), tmp_path / "out" / "w.pth")
    monkeypatch.chdir(tmp_path)
    script, *given = (
        words.replace("DATA", str(tmp_path / "data"))
        .replace("WEIGHTS", WEIGHTS)
        .replace("OUT", str(tmp_path / "out"))
        .split()
    )
    main([os.path.join(REAL, script), *given])
