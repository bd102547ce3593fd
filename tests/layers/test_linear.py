"""The mixer's linear layer: a `torch.nn.Linear` to everything that looks for one."""

import copy

import pytest
import torch
from timm.models._features_fx import create_feature_extractor
from torch import nn
from torch.fx import GraphModule

from semivim.layers.linear import Linear
from tests.tolerance import assert_close


@pytest.fixture
def pair():
    plain = nn.Linear(70, 96, bias=False)
    layer = Linear(70, 96)
    layer.load_state_dict(plain.state_dict())
    return layer, plain, torch.randn(3, 20, 70)


def test_is_torchs_linear(pair):
    layer, plain, x = pair
    assert isinstance(layer, nn.Linear)
    assert layer.bias is None
    assert_close("y", layer(x), plain(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_scripted_and_traced(pair):
    layer, plain, x = pair
    assert torch.equal(torch.jit.script(layer)(x), plain(x))
    assert torch.equal(torch.jit.trace(layer, x)(x), plain(x))


def test_is_a_leaf_of_timms_feature_graph(pair):
    layer, plain, x = pair
    graph = create_feature_extractor(nn.Sequential(layer, nn.ReLU()), ["1"])
    assert isinstance(graph, GraphModule)
    assert_close("y", graph(x)["1"], plain(x).relu())


def test_hooks_and_copies_run(pair):
    layer, plain, x = pair
    seen = []
    twin = copy.deepcopy(layer)
    twin.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    twin(x)
    assert seen == [(3, 20, 96)]


def test_device_and_dtype():
    assert Linear(4, 8, device="meta", dtype=torch.float16).weight.dtype == torch.float16
    assert Linear(4, 8, device="meta")(torch.empty(2, 4, device="meta")).shape == (2, 8)
