import pytest
import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from semivim.layers.plain_module import is_plain, is_plain_causal_conv


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(register):
    layer = nn.Linear(3, 4)
    getattr(layer, register)(lambda *_: None)
    return layer


def parametrized():
    layer = nn.Linear(3, 4)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    return layer


def test_a_linear_layer_is_plain():
    assert is_plain(nn.Linear(3, 4), nn.Linear)
    assert is_plain(nn.Linear(3, 4, device="meta", dtype=torch.bfloat16), nn.Linear)


HOOKS = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
         "register_full_backward_pre_hook")  # fmt: skip


@pytest.mark.parametrize(
    "layer",
    (
        Doubled(3, 4),
        nn.Identity(),
        parametrized(),
        weight_norm(nn.Linear(3, 4)),
        *(hooked(name) for name in HOOKS),
    ),
    ids=lambda layer: type(layer).__name__,
)
def test_a_replaced_or_wrapped_one_is_not(layer):
    assert not is_plain(layer, nn.Linear)


def test_a_forward_of_the_instance_counts():
    layer = nn.Linear(3, 4)
    layer.forward = lambda x: x
    assert not is_plain(layer, nn.Linear)


@pytest.mark.parametrize(
    "options",
    (
        {"dilation": 2, "padding": 6},
        {"stride": 2},
        {"padding": 0},
        {"bias": False},
        {"groups": 2},
        {"padding_mode": "circular"},
    ),
    ids=str,
)
def test_a_convolution_with_other_options_is_no_causal_one(options):
    plain = {"groups": 4, "padding": 3}
    assert is_plain_causal_conv(nn.Conv1d(4, 4, 4, **plain))
    assert not is_plain_causal_conv(nn.Conv1d(4, 4, 4, **plain | options))


@pytest.mark.parametrize(
    "register",
    (
        nn_module.register_module_forward_hook,
        nn_module.register_module_forward_pre_hook,
        nn_module.register_module_full_backward_hook,
        nn_module.register_module_full_backward_pre_hook,
    ),
)
def test_a_hook_on_all_modules_counts(register):
    layer = nn.Linear(3, 4)
    handle = register(lambda *_: None)
    try:
        assert not is_plain(layer, nn.Linear)
    finally:
        handle.remove()
    assert is_plain(layer, nn.Linear)
