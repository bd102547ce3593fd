import pytest
import torch
from torch import nn

from semivim.layers import RMSNorm
from tests.tolerance import assert_close


@pytest.fixture
def pair():
    plain, layer = nn.RMSNorm(70, eps=1e-5), RMSNorm(70)
    nn.init.normal_(plain.weight)
    layer.load_state_dict(plain.state_dict())
    return layer, plain, torch.randn(3, 20, 70)


def test_is_torchs(pair):
    layer, plain, x = pair
    assert isinstance(layer, nn.RMSNorm)
    assert layer.eps == plain.eps
    assert_close("y", layer(x), plain(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_scripted_and_traced(pair):
    layer, plain, x = pair
    assert torch.equal(torch.jit.script(layer)(x), plain(x))
    assert torch.equal(torch.jit.trace(layer, x)(x), plain(x))


def test_under_autocast_it_is_float32(pair):
    layer, plain, x = pair
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), plain(x)
    assert y.dtype == expected.dtype == torch.float32
    assert_close("y", y, expected)


def test_device_and_dtype():
    assert RMSNorm(4, device="meta", dtype=torch.float16).weight.dtype == torch.float16
    assert RMSNorm(4, device="meta")(torch.empty(2, 4, device="meta")).shape == (2, 4)
