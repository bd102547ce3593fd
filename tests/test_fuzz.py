"""Readers of files from elsewhere take damaged ones or refuse them in one line, and the harness sees those that do not.

``benchmarks/fuzz.py`` runs more cases of the same generators.
"""

import json
import time
from random import Random

import numpy as np
import pytest
import torch
import yaml

from benchmarks import fuzz as program
from benchmarks.fuzz import fuzz, main
from benchmarks.fuzz_cases import KINDS, Case
from semivim.data import ImageSource, load_split, read_list, save_split, sources
from semivim.data.label_split import make_split
from semivim.flags import parser
from semivim.hub import model_folder
from semivim.hub.model_folder import check_config
from semivim.runs import checkpoint
from semivim.utils import files
from semivim.utils.files import load_yaml
from semivim.utils.user_error import UserError, short

CASES = {"lists": 300, "splits": 300, "images": 300, "yaml": 150, "config": 60, "safetensors": 80, "checkpoints": 60}


class NeverError(Exception):
    """What nothing raises."""


@pytest.mark.parametrize("name", KINDS)
def test_damaged_files_are_taken_or_refused_in_one_line(name):
    result = fuzz(name, KINDS[name], CASES[name])
    assert [(fault.seed, fault.what) for fault in result.faults] == []
    assert result.accepted + result.refused == CASES[name]
    assert result.accepted > 0, "no case gets past the reader"
    assert result.refused > CASES[name] / 4, "hardly a case is damaged"


@pytest.mark.parametrize(
    ("name", "module", "guard", "planted"),
    [
        ("images", sources, "_DECODING_ERRORS", (NeverError,)),
        ("yaml", parser, "load_yaml", lambda text: {"lr": float(len(text.split("lr: ")[1]))}),
        ("config", model_folder, "check_numbers", lambda *_: 1 // 0),
        ("safetensors", files, "SafetensorError", NeverError),
        ("checkpoints", files, "UNREADABLE", (NeverError,)),
        ("checkpoints", checkpoint, "check_saved", lambda *_: None),
    ],
)
def test_a_guard_that_is_taken_out_is_seen(name, module, guard, planted, monkeypatch):
    monkeypatch.setattr(module, guard, planted)
    result = fuzz(name, KINDS[name], 40)
    assert result.faults
    seed = result.faults[0].seed
    (again,) = fuzz(name, KINDS[name], 1, seed).faults
    assert again.seed == seed
    assert again.what.split(":")[0] == result.faults[0].what.split(":")[0]


def reader_with(bug):
    """A kind of file of one byte, whose reader has a bug with the byte 3."""

    def kind(folder):
        def make(rng):
            (folder / "a.txt").write_bytes(bytes([rng.randrange(4)]))

            def read():
                if (byte := (folder / "a.txt").read_bytes()[0]) == 3:
                    bug()
                elif byte:
                    raise UserError("a.txt is damaged")

            return Case(read, ("a.txt",))

        return make

    return kind


def raises(error):
    def bug():
        raise error

    return bug


BUGS = {
    "KeyError: 'x'": raises(KeyError("x")),
    "SystemExit: 0": raises(SystemExit(0)),
    "UndocumentedError: a message of several lines": raises(UserError("a.txt\nis damaged")),
    "UndocumentedError: a message without a.txt": raises(UserError("damaged")),
    "_TooSlowError: it takes over 0.2 s": lambda: time.sleep(30),
}


@pytest.mark.parametrize("what", BUGS)
def test_a_planted_bug_is_reported_with_its_seed(what):
    kind = reader_with(BUGS[what])
    result = fuzz("planted", kind, 12, seed=5, limit_s=0.2)
    assert result.faults
    assert result.accepted
    assert result.refused
    assert result.accepted + result.refused + len(result.faults) == 12
    assert all(fault.what.startswith(what) for fault in result.faults)
    for fault in result.faults:
        assert Random(f"planted {fault.seed}").randrange(4) == 3


def test_a_reader_that_takes_much_memory_is_reported(monkeypatch):
    monkeypatch.setattr(program, "LIMIT_BYTES", 2**26)
    hoard = []
    peak = program.peak_bytes()
    kind = reader_with(lambda: hoard or hoard.append(np.ones(peak + 2**27, dtype=np.uint8)))
    (fault, *_) = fuzz("planted", kind, 12).faults
    assert fault.what.startswith("UndocumentedError: it takes ")


def test_program_prints_counts_and_seeds_and_its_status_tells(monkeypatch, capsys):
    monkeypatch.setattr(
        program, "KINDS", {"good": reader_with(raises(UserError("a.txt"))), "bad": reader_with(raises(OSError("disk")))}
    )
    assert main(["--cases", "12", "--kinds", "good"]) == 0
    assert "good: 12 cases, " in capsys.readouterr().out
    assert main(["--cases", "12"]) == 1
    out = capsys.readouterr().out
    (seed, *_) = [line.split("--seed ")[1].split()[0] for line in out.splitlines() if "--kinds bad" in line]
    assert main(["--cases", "1", "--kinds", "bad", "--seed", seed]) == 1
    out = capsys.readouterr().out
    assert "bad: 1 cases, 0 accepted, 0 refused with the documented error, 1 undocumented" in out
    assert "OSError: disk" in out
    assert "Traceback" in out


# The smallest inputs of what this fuzzer found.


@pytest.mark.parametrize("text", ["!!bool x", "!!int ''", "!!float ''", "!!timestamp x"])
def test_yaml_tags_that_do_not_fit_are_yaml_errors(text):
    with pytest.raises(yaml.YAMLError):
        load_yaml(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x" * 200_000, "line 1: field larger than field limit"),
        ("Index\n" + "9" * 5000, "line 2: index '9+' is out of range for 2 images"),
        ("a.jpg " + "9" * 5000, "line 1: "),
    ],
)
def test_fields_of_a_list_that_are_too_long_are_named(content, message, tmp_path):
    source = ImageSource(None, [0, 1], ["a", "b"], ["a.jpg", "b.jpg"], str(tmp_path))
    (tmp_path / "list").write_text(content)
    with pytest.raises(UserError, match=f"list.*{message}"):
        read_list(str(tmp_path / "list"), source, 2)


def test_damage_of_one_file_of_a_split_is_not_said_of_another(tmp_path):
    labels = [0, 1] * 4
    save_split(make_split(labels, 2, per_class=2), tmp_path)
    path = tmp_path / "unlabelled.txt"
    header, _, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header.replace(" 4 of", " 3 of"), *rows]))
    with pytest.raises(UserError, match=r"labelled.txt or unlabelled.txt is damaged"):
        load_split(tmp_path, labels, 2)


def config_with(tmp_path, **entries):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vim", **entries}))
    check_config(tmp_path, "model")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_classes": 10**400}, "num_classes is 1000.*, wanted at most 131,072"),
        ({"pretrained_cfg": {"x": 1}}, "pretrained_cfg has 'x', which timm does not know"),
        ({"global_pools": "avg"}, "pretrained_cfg has 'global_pools', which timm does not know"),
        ({"model_args": {"checkpoint_path": "other.pth"}}, "model_args has checkpoint_path, which no model takes"),
        ({"model_args": {"pretrained": True}}, "model_args has pretrained, which no model takes"),
    ],
)
def test_entries_of_a_config_that_no_model_takes_are_named(entries, message, tmp_path):
    with pytest.raises(UserError, match=f"^model: config.json.*{message}"):
        config_with(tmp_path, **entries)


def test_a_tensor_in_a_message_is_one_line():
    assert "\n" not in short(torch.zeros(3, 2))
