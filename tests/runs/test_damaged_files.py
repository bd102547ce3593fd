"""What a file of a run may raise where it is damaged: one line that names it, and nothing else."""

import json
import random
from tempfile import mkdtemp

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

from semivim.convert import convert
from semivim.data.label_split import load_split, make_split, save_split
from semivim.flags.parser import Parser, parse_flags
from semivim.hub.model_folder import load_folder
from semivim.runs.checkpoint import load_training_checkpoint
from semivim.runs.run_folder import read_best
from semivim.runs.run_log import RunLog
from semivim.utils.files import check_weights_file, load_weights
from semivim.utils.user_error import UserError
from tests.run_folder import write_run
from tests.runs.test_checkpoint import make_saver

LABELS = [0, 1] * 10


def read_args(folder):
    parser = Parser(prog="train")
    parser.add_argument("--lr", type=float)
    parse_flags(parser, ["-c", str(folder / "args.yaml")])


READERS = {  # by file: what reads it
    "best.json": read_best,
    "metrics.jsonl": lambda folder: RunLog(folder, 9, 5, 5),
    "summary.csv": lambda folder: RunLog(folder, 9, 5, 5),
    "labelled.txt": lambda folder: load_split(folder, LABELS, 2),
    "unlabelled.txt": lambda folder: load_split(folder, LABELS, 2),
    "last.pth.tar": lambda folder: load_training_checkpoint(folder / "last.pth.tar"),
    "config.json": lambda folder: load_folder(folder, "model"),
    "model.safetensors": lambda folder: load_folder(folder, "model"),
    "foreign.safetensors": lambda folder: check_weights_file(folder / "foreign.safetensors"),
    "convert.safetensors": lambda folder: convert(folder / "convert.safetensors", "test_vim", f"{mkdtemp()}/out"),
    "weights.pth": lambda folder: load_weights(folder / "weights.pth"),
    "args.yaml": read_args,
}
# Damage that no reader can notice: a line less, another number, an option of the model
MAY_PASS = {"metrics.jsonl", "summary.csv", "config.json", "args.yaml", "foreign.safetensors", "convert.safetensors"}
WRONG = [
    b"",
    b"\n",
    b"\xff\xfe\x00",
    b"[]",
    b"3",
    b"null",
    b"{",
    b'{"epoch": "x"}',
    b"[" * 100_000,
    b'"x"',
    b"x,y\nz\n",
]


@pytest.fixture
def folder(tmp_path):
    write_run(tmp_path)
    (tmp_path / "args.yaml").write_text(yaml.safe_dump({"lr": 0.1}))
    (tmp_path / "best.json").write_text(json.dumps({"epoch": 1, "model": "student", "top1": 3.0}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"update": n, "lr": 0.1}) + "\n" for n in range(4)))
    save_split(make_split(LABELS, 2, per_class=2), tmp_path)
    make_saver(tmp_path).save_checkpoint(0, 1.0)
    weights = timm.create_model("test_vim").state_dict()
    save_file(weights, tmp_path / "foreign.safetensors")
    save_file(weights, tmp_path / "convert.safetensors")
    torch.save(weights, tmp_path / "weights.pth")
    return tmp_path


def test_whole_files_are_read(folder):
    for read in READERS.values():
        read(folder)


def refused(name, folder, capsys):
    """Whether the reader refuses the file, in one line that names it."""
    try:
        READERS[name](folder)
    except UserError as error:
        assert name in str(error) or (name == "model.safetensors" and "the weights do not load" in str(error))
        assert "\n" not in str(error)
        return True
    except SystemExit:  # of the parser
        said = capsys.readouterr().err
        assert name in said and said.count("\n") == 1
        return True
    return False


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_one_line_that_names_it(name, folder, capsys):
    path, rng = folder / name, random.Random(name)
    whole = path.read_bytes()
    for content in WRONG:
        path.write_bytes(content)
        assert refused(name, folder, capsys) or name in MAY_PASS, content
    for _ in range(12):
        damaged = bytearray(whole)
        place = rng.randrange(len(damaged))
        if rng.random() < 0.5:
            del damaged[place:]
        else:
            damaged[place : place + 4] = rng.randbytes(4)
        path.write_bytes(damaged)
        refused(name, folder, capsys)
