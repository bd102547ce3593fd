"""Options are held against a model without memory for it; a bug of the model's is no mistake of the user's."""

import time

import pytest
import timm
import torch

import semivim  # noqa: F401
from semivim.models import vim
from semivim.utils.model_options import Limit, check_name, check_numbers, check_options, did_you_mean_model
from semivim.utils.user_error import UserError


@pytest.mark.parametrize("name", ["test_vim", "test_vit", "test_resnet", "test_convnext", "test_efficientnet"])
def test_models_take_their_own_options(name):
    check_options(name, {"num_classes": 3, "in_chans": 1}, "options")
    assert torch.empty(0).device.type == "cpu"
    assert timm.create_model(name).get_classifier().weight.device.type == "cpu"


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"colour": 1}, "'colour'"),
        ({"depth": "x"}, "'str'"),
        ({"patch_size": 0}, "ZeroDivisionError|zero"),
        ({"ssmixup_layers": 9}, "wanted 1 to 4"),
        (
            {"img_size": 100_000},
            "over the limit of 1,000,000 numbers in 500 tensors, with pos_embed of 1x",
        ),
        ({"depth": 10**5, "embed_dim": 8}, "over the limit of 1,000,000 numbers"),
        ({"num_classes": 10**30}, "^what: "),
    ],
    ids=str,
)
def test_options_that_no_model_takes_are_one_line_and_soon(options, cause):
    start_s = time.process_time()
    with pytest.raises(UserError, match=cause) as error:
        check_options("test_vim", options, "what", Limit(10**6, 500))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("what: ")
    assert time.process_time() - start_s < 10


def test_a_limit_ends_with_its_check():
    with pytest.raises(UserError, match="limit of 100 numbers"):
        check_options("test_vim", {}, "what", Limit(100))
    check_options("test_vim", {}, "what")
    assert timm.create_model("test_vim").blocks


def test_a_bug_of_the_model_is_raised_as_it_is(monkeypatch):
    def broken(self, *args, **kwargs):
        raise LookupError("a bug")

    monkeypatch.setattr(vim.Vim, "__init__", broken)
    with pytest.raises(LookupError, match="a bug") as error:
        check_options("test_vim", {"depth": 2}, "what")
    assert not isinstance(error.value, UserError)


def test_names_and_tags():
    check_name("test_vim", "--model")
    check_name("vim_tiny_patch16_224.hustvl_in1k", "--model")
    with pytest.raises(UserError, match=r"^--model: no such model of timm; did you mean .*test_vim"):
        check_name("test_vmi", "--model")
    with pytest.raises(UserError, match=r"^--model: Invalid pretrained tag .*; with weights: \S+\.hustvl_in1k$"):
        check_name("vim_tiny_patch16_224.nope", "--model")
    assert did_you_mean_model("?????") == ""


def test_numbers_are_found_wherever_they_are():
    check_numbers({"a": [1, {"b": 10}], "c": "x" * 50, "d": True, "e": None}, 10, "f")
    with pytest.raises(UserError, match=r"^f\.a\.b is 11, wanted at most 10$"):
        check_numbers({"a": [1, {"b": [3, 11]}]}, 10, "f")
    with pytest.raises(UserError, match=r"^f\.a is -1e\+30"):
        check_numbers({"a": -1e30}, 10, "f")
