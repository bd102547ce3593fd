import json
import re
import socket
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from timm.data import resolve_input_data_config

import semivim  # noqa: F401
from semivim.flags import model_flags
from semivim.flags.data_flags import add_augmentation_flags
from semivim.flags.parser import Parser, parse_flags
from semivim.models import vim
from semivim.runs.checkpoint import save_model
from semivim.utils.user_error import UserError
from tests.hub_client import shared_client, shared_hub
from tests.hub_server import Fault


def parse(words):
    parser = Parser(prog="train", allow_abbrev=False)
    model_flags.add_model_flags(parser, model="test_vim")
    model_flags.add_device_flags(parser)
    model_flags.add_ema_flags(parser)
    add_augmentation_flags(parser)
    return parser.parse_args(words.split())


def create(words, **options):
    args = parse(words)
    return model_flags.create_model(args, num_classes=7, **model_flags.classifier_kwargs(args), **options)


def test_model_is_the_one_of_the_flags():
    model = create("--img-size 48 --in-chans 1 --gp avg --drop 0.1 --drop-path 0.3 --grad-checkpointing")
    assert (model.num_classes, model.global_pool, model.grad_checkpointing) == (7, "avg", True)
    assert model(torch.zeros(1, 1, 48, 48)).shape == (1, 7)
    assert create("--input-size 1 32 64")(torch.zeros(1, 1, 32, 64)).shape == (1, 7)
    assert create("--model test_resnet --input-size 1 32 64")(torch.zeros(1, 1, 32, 64)).shape == (1, 7)
    assert create("--in-chans 4 --img-size 32")(torch.zeros(1, 4, 32, 32)).shape == (1, 7)
    assert create("--model-kwargs depth=2").blocks[1:2] and len(create("--model-kwargs depth=2").blocks) == 2
    assert len(create("--model-kwargs depth=2", depth=1).blocks) == 1
    assert create("--channels-last").patch_embed.proj.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--model vim_tiny_patch16_223",
            r"^--model vim_tiny_patch16_223: no such model of timm; did you mean vim_tiny_patch16_224, ",
        ),
        ("--model-kwargs depth=foo", r"^--model test_vim --model-kwargs \{'depth': 'foo'\}: "),
        ("--model-kwargs nonesuch=1", r"nonesuch"),
        ("--model-kwargs num_classes=3", r"^--model-kwargs num_classes=3: another flag gives the model this"),
        ("--gp magic", r"^--model test_vim: --gp is 'magic'"),
        ("--initial-checkpoint nowhere.pth", r"^--initial-checkpoint: nowhere\.pth is not a readable torch file"),
        ("--pretrained --pretrained-path nowhere.safetensors", r"nowhere\.safetensors is not a readable safetensors"),
        ("--model local-dir:nowhere", r"local-dir:nowhere: "),
        ("--model test_vim.nope", r"^--model test_vim\.nope: Invalid pretrained tag \(nope\)"),
        ("--pretrained", r"^--model test_vim: the weights do not load: No pretrained weights exist"),
        ("--num-classes 100000 --model-kwargs embed_dim=100000", r"over the limit of 2,147,483,648 numbers"),
    ],
)
def test_what_the_user_can_mend_is_one_line(words, message):
    with pytest.raises(UserError, match=message) as error:
        create(words)
    assert "\n" not in str(error.value)


def test_a_model_of_any_size_gets_its_size_from_the_images():
    assert create("--model test_vmamba --img-size 48")(torch.zeros(1, 3, 48, 48)).shape == (1, 7)
    assert create("--model test_vmamba --input-size 1 32 64")(torch.zeros(1, 1, 32, 64)).shape == (1, 7)


def test_a_network_of_convolutions_takes_images_of_any_size():
    assert create("--model test_resnet --img-size 48")(torch.zeros(1, 3, 48, 48)).shape == (1, 7)
    args = parse("--model test_resnet --input-size 1 48 64")
    model = model_flags.create_model(args, num_classes=7)
    assert resolve_input_data_config(model, vars(args))["input_size"] == (1, 48, 64)
    assert model(torch.zeros(1, 1, 48, 64)).shape == (1, 7)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model vgg11 --drop-path 0.1", "^--model vgg11 does not take --drop-path$"),
        (
            "--model test_resnet --model-kwargs depth=2",
            r"^--model test_resnet --model-kwargs {.depth.: 2}: .*unexpected keyword argument .depth.$",
        ),
        ("--model test_resnet --gp magic", "^--model test_resnet: .*Invalid pool type: magic"),
        ("--model dla46x_c --grad-checkpointing", "^--grad-checkpointing: --model dla46x_c does not support it$"),
    ],
)
def test_what_another_model_does_not_take_is_named_by_its_flag(words, message):
    with pytest.raises(UserError, match=message):
        create(words)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_vmamba"])
def test_ssmixup_needs_a_vim(name):
    with pytest.raises(UserError, match=f"--model {name} does not take --pseudo-mixup ss: SSMixup needs a Vim"):
        create(f"--model {name}", ssmixup_c="own", ssmixup_layers=None)


CREATE = """
from semivim.flags.model_flags import add_model_flags, create_model
from semivim.flags.data_flags import add_augmentation_flags
from semivim.flags.parser import Parser
parser = Parser()
add_model_flags(parser, model="")
add_augmentation_flags(parser)
create_model(parser.parse_args(words), 3)
"""


@pytest.mark.parametrize("words", [["--model", "test_vit", "--pretrained"], ["--model", "hf-hub:org/nothing"]])
@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        (500, r"500 Internal Server Error: the Hub failed, try again later .*\(3 tries\)"),
        (404, "404 Not Found"),
        ("hang", r"no answer in time \(3 tries\)"),  # as a refused port and offline mode, see test_hub_session.py
    ],
)
def test_a_hub_that_fails_is_one_line_soon(words, kind, cause):
    hub = shared_hub()
    hub.fault = Fault("(GET|HEAD) /", kind)
    try:
        answer = shared_client().run(CREATE, words=words)
    finally:
        hub.fault = None
    assert re.fullmatch(
        rf"HubError: (hf-hub:)?{words[1].removeprefix('hf-hub:')}: {hub.url}/.*: {cause}.*", answer.line
    )
    assert answer.seconds < 15


@pytest.mark.parametrize("words", ["", "--model-kwargs depth=2", "--initial-checkpoint {folder}/w.pth"])
@pytest.mark.parametrize(
    "kind", [AttributeError, TypeError, KeyError, AssertionError, RuntimeError, ValueError, OSError]
)
def test_a_bug_inside_the_model_is_no_mistake_of_the_users(kind, words, tmp_path, monkeypatch):
    torch.save({}, tmp_path / "w.pth")

    def broken(self, *args, **kwargs):
        raise kind("'Vim' object has no attribute 'typo'")

    monkeypatch.setattr(vim.Vim, "__init__", broken)
    with pytest.raises(kind) as error:
        create(words.format(folder=tmp_path))
    assert not isinstance(error.value, UserError)


def test_a_process_that_hangs_is_waited_for_as_long_as_the_flag_says(monkeypatch, tmp_path):
    def init(args):
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        args.distributed = True
        return torch.device("cpu")

    monkeypatch.setattr(model_flags, "init_distributed_device", init)
    try:
        model_flags.open_device(parse("--dist-timeout 7"))
        backend = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
        assert backend.options._timeout.total_seconds() == 7
    finally:
        torch.distributed.destroy_process_group()


def test_a_port_in_use_is_one_line(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "0", "LOCAL_RANK": "0"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("WORLD_SIZE", "2")
        said = f"^the processes of the run cannot meet: .*{port}.*; torchrun --standalone takes a free port$"
        with pytest.raises(UserError, match=said) as error:
            model_flags.open_device(parse("--device cpu"))
    assert "\n" not in str(error.value)


def test_weights_of_another_model_are_named(tmp_path):
    torch.save(create("--model-kwargs embed_dim=16").state_dict(), tmp_path / "w.pth")
    for words in (f"--initial-checkpoint {tmp_path}/w.pth", f"--pretrained --pretrained-path {tmp_path}/w.pth"):
        name = words.split()[-2]
        said = rf"^--model test_vim {name} \S+w\.pth: the weights do not load: "
        with pytest.raises(UserError, match=said) as error:
            create(words)
        assert "\n" not in str(error.value)


def test_a_foreign_config_is_held_against_its_weights(tmp_path):
    """A folder from elsewhere must not take memory that its weights do not need."""
    save_model(create(""), tmp_path)
    assert create(f"--model local-dir:{tmp_path} --pretrained").num_classes == 7
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_args": {"img_size": 100_000}}))
    for words in ("", "--pretrained"):
        said = r"^--model local-dir:\S+: config\.json does not suit test_vim: the model is over "
        with pytest.raises(UserError, match=said):
            create(f"--model local-dir:{tmp_path} {words}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--input-size 3 30 30", "--input-size"),
        ("--img-size 30", "--img-size"),
        ("--model-kwargs img_size=30", "img_size"),
    ],
)
@pytest.mark.parametrize("folder", [False, True])
def test_an_error_names_the_flag_that_gave_a_size_and_leaves_the_models_name(
    folder, words, said, tmp_path, monkeypatch
):
    init = vim.Vim.__init__

    def picky(self, *args, img_size=32, **options):
        if np.ravel(img_size)[0] == 30:
            raise ValueError("img_size is 30, wanted a multiple of 16")
        init(self, *args, img_size=img_size, **options)

    monkeypatch.setattr(vim.Vim, "__init__", picky)
    model = "test_vim"
    if folder:
        (tmp_path / "num_classes").mkdir()
        save_model(create(""), tmp_path / "num_classes")
        model = f"local-dir:{tmp_path}/num_classes"
    with pytest.raises(UserError) as error:
        create(f"--model {model} {words}")
    assert str(error.value).startswith(f"--model {model}")
    assert str(error.value).endswith(f": {said} is 30, wanted a multiple of 16")


def test_sizes_in_a_flag_file_are_bounded(tmp_path, capsys):
    for key, value in (
        ("img_size", 100_000),
        ("batch_size", 10**9),
        ("num_classes", 10**12),
        ("input_size", [3, 9, 10**6]),
    ):
        (tmp_path / "args.yaml").write_text(f"{key}: {value}")
        parser = Parser(prog="train", allow_abbrev=False)
        model_flags.add_model_flags(parser, model="test_vim")
        with pytest.raises(SystemExit):
            parse_flags(parser, ["-c", str(tmp_path / "args.yaml")])
        assert re.search(
            rf"args\.yaml: {key}: {np.ravel(value)[-1]} is not a whole number in \[1, ", capsys.readouterr().err
        )


def test_device_and_precision():
    args = parse("--device cpu")
    assert model_flags.open_device(args) == torch.device("cpu")
    assert (args.rank, args.world_size) == (0, 1)
    with pytest.raises(UserError, match="--device nonsense: "):
        model_flags.open_device(parse("--device nonsense"))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert model_flags.mixed_precision(parse(""), cpu) == (nullcontext, None)
    autocast, scaler = model_flags.mixed_precision(parse("--amp --amp-dtype bfloat16"), cpu)
    with autocast():
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert scaler is None
    with pytest.raises(UserError, match="--amp-dtype float16 needs a GPU"):
        model_flags.mixed_precision(parse("--amp"), cpu)
    assert model_flags.mixed_precision(parse("--amp --amp-dtype bfloat16"), cuda)[1] is None
