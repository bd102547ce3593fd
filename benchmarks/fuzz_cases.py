"""Damaged files of every kind that is read from elsewhere, each with what reads it.

A kind is a function that writes whole files into a folder and returns a function that makes a :class:`Case` from a
random generator. Files start whole, so that most of the damage gets past the first check of their reader.
"""

import contextlib
import io
import json
import re
import shutil
import struct
import tempfile
import zipfile
import zlib
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import yaml
from PIL import Image, TiffImagePlugin
from safetensors.torch import save_file
from timm.scheduler import create_scheduler_v2
from timm.utils import NativeScaler

import train_ssl
from benchmarks.mutations import ODD, ODD_TENSORS, changed, damaged, damaged_lines
from semivim.convert import convert
from semivim.data.label_split import UNKNOWN, load_split, make_split, save_split
from semivim.data.list_files import read_list, split_from_lists
from semivim.data.sources import ImageSource
from semivim.data.views import View
from semivim.flags.parser import flag
from semivim.hub.model_card import public_args
from semivim.hub.model_folder import load_folder
from semivim.inference import load_model
from semivim.runs.checkpoint import RUN_LAYOUT, AtomicCheckpointSaver, load_training_checkpoint, restore, save_model
from semivim.runs.progress import Progress
from semivim.runs.run_folder import ARGS, CONFIG, LAST, WEIGHTS, check_unchanged
from semivim.task.semi_supervised import SemiSupervisedTask
from semivim.utils.checksum import seal_checkpoint, seal_safetensors
from semivim.utils.files import (
    check_weights_file,
    load_untrusted,
    load_weights,
    load_yaml,
    read_mapping,
    weights_shapes,
)
from semivim.utils.preprocessing import resolve_preprocessing
from semivim.utils.user_error import UserError

TEXT_TOKENS = [
    "", " ", "\t", "#", "\r", "\0", "\x1b[2J", "\ufeff", "\u2028", "\x85", "\u0663", "0", "-1", "1", "3", "+2",
    "1.5", "1e3",
    "9" * 30, "9" * 5000, "nan", "..", "../canary", "/etc/passwd", "~", "a/../../b", "\\\\host\\x", '"', "'", '"a',
    "x" * 200_000,
]  # fmt: skip


class Case(NamedTuple):
    """A damaged file.

    Attributes:
        read: What a program does with it; returns, or raises a UserError.
        named: What the line of the error must hold one of, so that the user finds the place.
    """

    read: Callable[[], object]
    named: tuple[str, ...]


Kind = Callable[[Path], Callable[[Random], Case]]


# Checkpoints


class _Parts(NamedTuple):
    task: SemiSupervisedTask
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: NativeScaler


def _parts() -> _Parts:
    model = timm.create_model("test_vim", num_classes=3, depth=1, img_size=16)
    task = SemiSupervisedTask(model, 3, progress=Progress())
    task.setup_ema()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler, _ = create_scheduler_v2(optimizer, "plateau", num_epochs=20, patience_epochs=2, decay_rate=0.5)
    return _Parts(task, optimizer, scheduler, NativeScaler(device="cpu"))


def _saver(folder: Path, parts: _Parts) -> AtomicCheckpointSaver:
    return AtomicCheckpointSaver(
        folder,
        lambda _: None,
        model=parts.task.trainable_module,
        optimizer=parts.optimizer,
        args=Namespace(model="test_vim", img_size=16, seed=0, run_layout=RUN_LAYOUT),
        amp_scaler=parts.scaler,
        max_history=1,
        task=parts.task,
    )


def _resume(path: Path, canary: Path) -> None:
    """What a program does with the file of ``--resume``, in a folder of its own beside one that it may not touch."""
    checkpoint = load_training_checkpoint(path)
    check_unchanged(
        vars(checkpoint["args"]), {"img_size": 16, "seed": 0}, {name: flag(name) for name in ("img_size", "seed")}
    )
    parts = _parts()
    restore(checkpoint, path, *parts)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        run = Path(folder) / path.parent.name
        run.mkdir()
        shutil.copy(path, run / LAST)
        saver = _saver(run, parts)
        saver.load_state_dict(checkpoint["saver"])
        saver.finish_save(*checkpoint["saver"]["pending"])
        saver.save_checkpoint(9, 9.0)
    assert canary.exists(), "a file outside the run folder was removed"


def checkpoints(folder: Path) -> Callable[[Random], Case]:
    """Files of torch.save, with and without a SHA-256: their bytes, the pickle in the archive, and their entries."""
    parts = _parts()
    sum(p.sum() for p in parts.task.trainable_module.parameters()).backward()
    parts.optimizer.step()
    (canary := folder / "canary").touch()
    saver = _saver(folder, parts)
    saver.save_checkpoint(0, 1.0)
    sealed = (folder / LAST).read_bytes()
    content = load_training_checkpoint(folder / LAST)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    legacy = io.BytesIO()
    torch.save(content, legacy, _use_new_zipfile_serialization=False)
    bare = buffer.getvalue()
    path = folder / "damaged.pth.tar"
    keys = ["state_dict", "args", "saver", "checkpoint_files", "lr", "params", "x", "../canary"]

    def make(rng: Random) -> Case:
        draw = rng.random()
        if draw < 0.3:
            path.write_bytes(damaged(rng.choice((sealed, bare, legacy.getvalue())), rng))
        elif draw < 0.55:
            path.write_bytes(_with_damaged_pickle(bare, rng))
        else:
            torch.save(changed(content, rng, ODD + ODD_TENSORS, keys), path)
            if rng.random() < 0.5:
                seal_checkpoint(path)
        readers = (lambda: _resume(path, canary), lambda: load_untrusted(path))
        return Case(rng.choices(readers, (3, 1))[0], (path.name, "--", "the checkpoint's history"))

    return make


def _with_damaged_pickle(archive: bytes, rng: Random) -> bytes:
    """An archive that is whole, but for one of its small members."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(result, "w") as new:
        names = old.namelist()
        small = [name for name in names if "/data/" not in name]
        victim = rng.choice(small) if rng.random() < 0.2 else next(name for name in names if name.endswith("data.pkl"))
        for name in names:
            data = old.read(name)
            new.writestr(name, damaged(data, rng) if name == victim else data)
    return result.getvalue()


# Lists and splits

_NAMES = [f"{name}/{i}.jpg" for name in ("cat", "dog", "fox") for i in range(6)] + ["dog/a b.jpg", "cat/\u00e9 2.jpg"]
_LABELS = ["cdf".index(name[0]) for name in _NAMES]


def _no_image(_: int) -> Image.Image:
    raise AssertionError("a list does not open images")


def label_lists(folder: Path) -> Callable[[Random], Case]:
    """Lists of images in every format: names, paths with labels, indices and columns; alone, or to validate with."""
    source = ImageSource(_no_image, _LABELS, ["cat", "dog", "fox"], _NAMES, str(folder / "train"))
    unlabelled = ImageSource(_no_image, [UNKNOWN] * len(_NAMES), None, _NAMES, str(folder / "train"))
    nameless = ImageSource(_no_image, _LABELS, ["cat", "dog", "fox"])
    whole = [
        "\n".join(_NAMES[::2]),
        "\n".join(f"train/{name} {label}" for name, label in zip(_NAMES, _LABELS, strict=True)),
        "\n".join(f"{folder}/train/{name}" for name in _NAMES[:5]),
        "\n".join(["Index,Path", *(f"{i},{_NAMES[i]}" for i in range(0, 18, 3))]),
        "\n".join(["image_id,label", *(f"{name},{name[:3]}" for name in _NAMES[:6])]),
        "\n".join(["# labelled", "", *(f"{name},{label}" for name, label in zip(_NAMES, _LABELS, strict=True))]),
    ]
    path, labelled = folder / "damaged.list", folder / "labelled.list"
    labelled.write_text("\n".join(f"{_NAMES[i]} {_LABELS[i]}" for i in (0, 6, 12)))
    tokens = [*TEXT_TOKENS, *_NAMES[:2], "0.jpg", "1", "2", "cat", "Index", "label", "image_id"]

    def make(rng: Random) -> Case:
        text = rng.choice(whole)
        if rng.random() < 0.7:
            data = damaged_lines(text, rng, tokens).encode()
        else:
            data = damaged(text.encode(), rng, [token.encode() for token in tokens])
        path.write_bytes(data)
        part = rng.choice((source, source, unlabelled, nameless))
        data_dir = rng.choice((None, str(folder)))
        if part is nameless or rng.random() < 0.7:
            return Case(lambda: read_list(str(path), part, 3, data_dir), (path.name,))
        split = partial(split_from_lists, part, 3, str(labelled), None, data_dir, str(path))
        return Case(split, (path.name, str(folder), "--"))  # an image may be in both lists

    return make


def saved_splits(folder: Path) -> Callable[[Random], Case]:
    """The three files of a saved split."""
    labels = np.array(_LABELS)
    save_split(make_split(labels, 3, per_class=2, validation=[0, 8, 16]), folder, _NAMES)
    whole = {role: (folder / f"{role}.txt").read_bytes() for role in ("labelled", "unlabelled", "validation")}
    tokens = [*TEXT_TOKENS, "2", "17", "cat/1.jpg"]

    def make(rng: Random) -> Case:
        role = rng.choice(list(whole))
        for name, data in whole.items():
            (folder / f"{name}.txt").write_bytes(data)
        if rng.random() < 0.7:
            text = damaged_lines(whole[role].decode(), rng, tokens, " ")
            if rng.random() < 0.7:  # a header that fits leads on to the checks of the entries
                entries = len(text.splitlines()) - 1
                text = re.sub(r"\d+ of", f"{entries} of", text, count=1)
            data = text.encode()
        else:
            data = damaged(whole[role], rng, [token.encode() for token in tokens])
        (folder / f"{role}.txt").write_bytes(data)
        given = rng.choice((labels, np.full(len(labels), UNKNOWN)))
        names = rng.choice((_NAMES, None))
        return Case(lambda: load_split(folder, given, 3, names), (f"{role}.txt",))

    return make


# YAML

_YAML_TOKENS = [
    "&a ", "*a", "<<: *a", "? [1]", ": ", "- ", "---", "...", "%YAML 2.0", "!!python/object/apply:os.getcwd []",
    "!!int ''", "!!int x", "!!float ''", "!!float x", "!!bool x", "!!timestamp x", "!!binary x", "!!binary \u00e9",
    "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a]", "!!null x", "!!str [1]", "!!map [1]", "!!seq {}", "!x y",
    "2026-13-01", "2026-11-27 25:00:00", "0x", "0b2", "0o9", "1:60", "1:99:99.5", "1e999", ".nan", "-.inf", "|", ">",
    "|9", "{", "[", "}", "]", "[" * 3000, "{a: " * 500, "=", "a: &b [*b]", "=: 1",
]  # fmt: skip


@contextlib.contextmanager
def _parser_errors() -> Iterator[None]:
    """Raise what a parser printed in one line before it left with status 2 as a UserError."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as stop:
        lines = said.getvalue().splitlines()
        if stop.code != 2 or len(lines) != 1:
            raise AssertionError(f"status {stop.code} with {len(lines)} lines") from stop
        raise UserError(lines[0]) from stop


def yaml_files(folder: Path) -> Callable[[Random], Case]:
    """Files of flags, as the argument of ``-c`` and as the args.yaml of a run that becomes a model card."""
    args = {key: value for key, value in vars(train_ssl.parse_args([])).items() if value is not None}
    bases = [
        args,
        {"lr": 0.1, "opt_kwargs": {"eps": 1e-8}, "opt_betas": [0.9, 0.99], "amp": True, "model": "test_vim"},
        {"epochs": 3, "data_dir": str(folder), "mean": [0.5, 0.5, 0.5], "labels_per_class": 4},
    ]
    texts = [yaml.safe_dump(base, sort_keys=False) for base in bases]
    path = folder / ARGS
    parser = train_ssl.build_parser()

    def parse() -> None:
        with _parser_errors():
            parser.read_config(str(path))
            train_ssl.parse_args(["-c", str(path)])

    def make_card() -> None:
        public_args(read_mapping(path, load_yaml, str(folder)))

    def make(rng: Random) -> Case:
        number, draw = rng.randrange(len(bases)), rng.random()
        if draw < 0.5:
            content = changed(bases[number], rng, keys=["lr", "model", "data_dir", "config", "help", "x"])
            data = yaml.safe_dump(content, sort_keys=False, default_flow_style=rng.choice((None, True, False))).encode()
        elif draw < 0.8:
            data = damaged_lines(texts[number], rng, _YAML_TOKENS + TEXT_TOKENS, " ").encode()
        else:
            data = damaged(texts[number].encode(), rng, [token.encode() for token in _YAML_TOKENS])
        path.write_bytes(data)
        return Case(rng.choice((parse, parse, make_card)), (path.name, "--"))  # some flags exclude others

    return make


# Images


def images(folder: Path) -> Callable[[Random], Case]:
    """Image files of every mode and compression; in half of the PNG files the damage has the checksum that fits it."""
    whole = [image_bytes(*options) for options in IMAGES]
    path = folder / "a.img"
    tokens = [b"IDAT", b"tRNS", b"PLTE", b"acTL", b"iCCP", b"\xff\xd8", b"\xff\xc4", b"Exif\0\0", b"II*\0", b"GIF89a"]

    def make(rng: Random) -> Case:
        data = rng.choice(whole)
        is_png = data.startswith(b"\x89PNG")
        path.write_bytes(_damaged_png(data, rng) if is_png and rng.random() < 0.7 else damaged(data, rng, tokens))
        source = ImageSource(lambda _: Image.open(path), [0], names=[path.name], root=str(folder))

        def read() -> None:
            image = source.image(0)
            assert image.mode in ("L", "RGB"), f"an image of mode {image.mode}"
            assert np.asarray(image).dtype == np.uint8

        return Case(read, (path.name,))

    return make


def _pixels(mode: str) -> Image.Image:
    rng = np.random.default_rng(0)
    if mode in ("I;16", "I"):
        return Image.fromarray(rng.integers(0, 2**12, (16, 20)).astype(np.uint16))
    if mode == "F":
        return Image.fromarray(rng.random((16, 20), dtype=np.float32))
    image = Image.fromarray(rng.integers(0, 256, (16, 20, 4), dtype=np.uint8), "RGBA")
    return image if mode == "RGBA" else image.convert(mode)


IMAGES: list[tuple[str, str, dict[str, Any]]] = [
    ("RGB", "JPEG", {}),
    ("L", "JPEG", {"progressive": True}),
    ("CMYK", "JPEG", {}),
    ("RGB", "PNG", {}),
    ("P", "PNG", {}),
    ("P", "PNG", {"transparency": 3}),
    ("L", "PNG", {"transparency": 3}),
    ("1", "PNG", {}),
    ("LA", "PNG", {}),
    ("RGBA", "PNG", {}),
    ("I;16", "PNG", {}),
    ("I;16", "TIFF", {}),
    ("I;16", "TIFF", {"compression": "tiff_lzw"}),
    ("I;16", "TIFF", {"tiffinfo": TiffImagePlugin.ImageFileDirectory_v2(), "compression": "tiff_adobe_deflate"}),
    ("F", "TIFF", {}),
    ("CMYK", "TIFF", {}),
    ("I;16", "PPM", {}),
    ("P", "GIF", {}),
    ("P", "GIF", {"save_all": True, "append_images": [Image.new("P", (20, 16), 7)], "transparency": 2, "loop": 0}),
    ("RGBA", "WEBP", {}),
    ("RGB", "BMP", {}),
    ("RGBA", "ICO", {}),
    ("RGB", "JPEG2000", {}),
]


def image_bytes(mode: str, file_format: str, options: dict[str, Any]) -> bytes:
    """A small image as a file."""
    buffer = io.BytesIO()
    _pixels(mode).save(buffer, file_format, **options)
    return buffer.getvalue()


def _damaged_png(data: bytes, rng: Random) -> bytes:
    """Damage one chunk and write the length and the checksum that fit it, without which nothing else is looked at."""
    chunks, place = [], 8
    while place < len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += 12 + length
    number = rng.randrange(len(chunks))
    name, body = chunks[number]
    is_pixels = name == b"IDAT"
    if rng.random() < 0.3:
        name = rng.choice((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"iCCP", b"zTXt", b"acTL", b"fdAT", b"eXIf", b"pHYs"))
    if is_pixels and rng.random() < 0.5:
        body = zlib.compress(damaged(zlib.decompress(body), rng))
    elif rng.random() < 0.9:
        body = damaged(body, rng)
    chunks[number] = (name, body)
    if rng.random() < 0.2:
        chunks.insert(rng.randrange(len(chunks)), rng.choice(chunks))
    packed = (struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks)
    return data[:8] + b"".join(packed)


# Models


def _write_model(folder: Path) -> None:
    torch.manual_seed(0)
    save_model(timm.create_model("test_vim", num_classes=3), folder, ["cat", "dog", "fox"])


def model_configs(folder: Path) -> Callable[[Random], Case]:
    """The config.json of a model's folder, loaded as ``local-dir:FOLDER``."""
    _write_model(folder)
    path = folder / CONFIG
    text = path.read_text(encoding="utf-8")
    odd = [*ODD, "test_vit", "test_resnet", "test_vim", "bicubic", "avg", [3, 32, 32], [3, 10**5, 10**5], 100_000]
    keys = [
        "img_size", "depth", "embed_dim", "patch_size", "num_classes", "in_chans", "drop_rate", "global_pool",
        "pretrained",
        "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "features_only", "scriptable", "file", "url",
        "hf_hub_id",
        "custom_load", "state_dict", "label_names", "semivim_pixel_rules", "mean", "std", "input_size", "x",
    ]  # fmt: skip

    def load() -> None:
        model = load_model(f"local-dir:{folder}")
        View(**resolve_preprocessing(model, f"local-dir:{folder}"), is_training=False)

    def make(rng: Random) -> Case:
        if rng.random() < 0.8:
            path.write_text(json.dumps(changed(json.loads(text), rng, odd, keys)), encoding="utf-8")
        else:
            path.write_bytes(
                damaged(text.encode(), rng, [b"[" * 3000, b"1e999", b"NaN", b'"', b"9" * 5000, b"\\ud800"])
            )
        return Case(load, (folder.name,))

    return make


def safetensors_files(folder: Path) -> Callable[[Random], Case]:
    """Safetensors files, with and without a SHA-256: their bytes, and their header with the length that fits it."""
    _write_model(folder)
    path = folder / WEIGHTS
    sealed = path.read_bytes()
    save_file(load_weights(path), path, {"format": "pt"})
    bare = path.read_bytes()
    start = 8 + int.from_bytes(bare[:8], "little")
    dtypes = ["F16", "F64", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "U16", "f32", "Q"]
    odd = [*ODD, *dtypes, [0, 4], [4, 0], [0, 2**63], [2**40, 2**40]]

    def check() -> None:
        check_weights_file(path)
        weights_shapes(path)
        load_weights(path)

    def make(rng: Random) -> Case:
        if rng.random() < 0.4:
            path.write_bytes(damaged(rng.choice((sealed, bare)), rng))
        else:
            header = changed(
                json.loads(bare[8:start]), rng, odd, ["__metadata__", "dtype", "shape", "data_offsets", "x"]
            )
            encoded = json.dumps(header).encode()
            encoded += b" " * (-len(encoded) % 8)
            path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bare[start:])
            if isinstance(header, dict) and isinstance(header.get("__metadata__", {}), dict) and rng.random() < 0.3:
                seal_safetensors(path)
        readers: Sequence[Case] = (
            Case(check, (path.name,)),
            Case(lambda: load_folder(folder, str(folder)), (folder.name,)),
            Case(lambda: _convert(path), (path.name,)),
        )
        return rng.choices(readers, (3, 1, 1))[0]

    return make


def _convert(path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        convert(path, "test_vim", f"{folder}/out")


KINDS: dict[str, Kind] = {
    "checkpoints": checkpoints,
    "lists": label_lists,
    "splits": saved_splits,
    "yaml": yaml_files,
    "images": images,
    "config": model_configs,
    "safetensors": safetensors_files,
}
