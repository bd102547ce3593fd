"""Causal and anti-causal depthwise convolution with SiLU on GPUs, in Triton, forward and backward.

Dimensions: b images, l tokens, d channels, k taps. A program owns a tile of tokens and channels of one image and
computes both directions from one read of x; its neighbours' tokens come from the cache. Sums are float32. The
gradients of taps and biases are written per program and summed in fixed order: the same bits every time.

Source: Zhu et al. 2024 (Vision Mamba, arXiv:2401.09417), Algorithm 1.
"""
# mypy: disallow-untyped-defs=False, check-untyped-defs=False
# Triton reads its kernels, not Python: arguments are pointers or tiles.

import torch
import triton
import triton.language as tl
from torch import Tensor

from .scan_kernels_triton import sigmoid
from .scan_triton import MOST_IMAGES, unavailable

__all__ = ["bidirectional_conv_backward", "bidirectional_conv_forward", "unavailable"]

BLOCK_L = 16
BLOCK_D = 64
LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _tap(weight, j, channel, d, TAPS: tl.constexpr):
    return tl.load(weight + channel * TAPS + j, mask=channel < d, other=0).to(tl.float32)[None, :]


@triton.jit
def _load(x, token, channel, l, d, x_token, x_channel):
    """A tile ``(tokens, channels)``, zeros outside the sequence."""
    exists = (token >= 0)[:, None] & (token < l)[:, None] & (channel < d)[None, :]
    at = x + token[:, None] * x_token + channel[None, :] * x_channel
    return tl.load(at, mask=exists, other=0).to(tl.float32)


@triton.jit
def _convolve(x, weight, bias, token, channel, l, d, x_token, x_channel, REVERSE: tl.constexpr, TAPS: tl.constexpr):
    """The convolution before SiLU at some tokens."""
    c = tl.load(bias + channel, mask=channel < d, other=0).to(tl.float32)[None, :]
    for j in tl.static_range(TAPS):
        shift = TAPS - 1 - j if REVERSE else j - (TAPS - 1)
        c = c + _tap(weight, j, channel, d, TAPS) * _load(x, token + shift, channel, l, d, x_token, x_channel)
    return c


@triton.jit
def _conv_forward(
    u, u_b, x, weight, bias, weight_b, bias_b, x_image, x_token, x_channel, l, d,
    TAPS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    image = tl.program_id(2).to(tl.int64)
    x += image * x_image
    exists = (token < l)[:, None] & (channel < d)[None, :]
    at = image * l * d + token[:, None] * d + channel[None, :]
    c = _convolve(x, weight, bias, token, channel, l, d, x_token, x_channel, False, TAPS)
    tl.store(u + at, c * sigmoid(c), mask=exists)
    c = _convolve(x, weight_b, bias_b, token, channel, l, d, x_token, x_channel, True, TAPS)
    tl.store(u_b + at, c * sigmoid(c), mask=exists)


@triton.jit
def _gradient_of_convolution(
    grad, x, weight, bias, token, channel, l, d, x_token, x_channel, REVERSE: tl.constexpr, TAPS: tl.constexpr
):
    """Gradient of the convolution before SiLU at some tokens, zeros outside the sequence."""
    c = _convolve(x, weight, bias, token, channel, l, d, x_token, x_channel, REVERSE, TAPS)
    slope = sigmoid(c)
    return _load(grad, token, channel, l, d, d, 1) * slope * (1 + c * (1 - slope))


@triton.jit
def _conv_backward_direction(
    dx, dweight, dbias, grad, x, weight, bias, token, channel, l, d, x_token, x_channel,
    REVERSE: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Add a direction to dx; write its program's share of the gradients of taps and bias."""
    own = _gradient_of_convolution(grad, x, weight, bias, token, channel, l, d, x_token, x_channel, REVERSE, TAPS)
    tl.store(dbias + channel, tl.sum(own, 0), mask=channel < d)
    for j in range(TAPS):
        shift = TAPS - 1 - j if REVERSE else j - (TAPS - 1)
        product = own * _load(x, token + shift, channel, l, d, x_token, x_channel)
        tl.store(dweight + channel * TAPS + j, tl.sum(product, 0), mask=channel < d)
        reader = _gradient_of_convolution(
            grad, x, weight, bias, token - shift, channel, l, d, x_token, x_channel, REVERSE, TAPS
        )
        dx = dx + _tap(weight, j, channel, d, TAPS) * reader
    return dx


@triton.jit
def _conv_backward(
    dx, dweights, dbiases, grad, grad_b, x, weight, bias, weight_b, bias_b, x_image, x_token, x_channel, l, d,
    TAPS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    image = tl.program_id(2).to(tl.int64)
    x += image * x_image
    grad += image * l * d
    grad_b += image * l * d
    share, shares = image * tl.num_programs(0) + tl.program_id(0), tl.num_programs(0) * tl.num_programs(2)
    total = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    total = _conv_backward_direction(
        total, dweights + share * d * TAPS, dbiases + share * d, grad, x, weight, bias,
        token, channel, l, d, x_token, x_channel, False, TAPS,
    )  # fmt: skip
    share += shares
    total = _conv_backward_direction(
        total, dweights + share * d * TAPS, dbiases + share * d, grad_b, x, weight_b, bias_b,
        token, channel, l, d, x_token, x_channel, True, TAPS,
    )  # fmt: skip
    exists = (token < l)[:, None] & (channel < d)[None, :]
    tl.store(dx + image * l * d + token[:, None] * d + channel[None, :], total, mask=exists)


def _grid(x: Tensor) -> tuple[int, int, int]:
    b, l, d = x.shape
    if b > MOST_IMAGES:
        raise ValueError(f"the Triton convolution takes at most {MOST_IMAGES} images in a batch, got {b}")
    return triton.cdiv(l, BLOCK_L), triton.cdiv(d, BLOCK_D), b


def bidirectional_conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor, weight_b: Tensor, bias_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Return u and u_b, contiguous ``(b, l, d)``."""
    u = torch.empty_like(x, memory_format=torch.contiguous_format)
    u_b = torch.empty_like(u)
    weights = (w.contiguous() for w in (weight, bias, weight_b, bias_b))
    with torch.cuda.device_of(x):
        _conv_forward[_grid(x)](
            u, u_b, x, *weights, *x.stride(), *x.shape[1:],
            TAPS=weight.shape[2], BLOCK_L=BLOCK_L, BLOCK_D=BLOCK_D, **LAUNCH,
        )  # fmt: skip
    return u, u_b


def bidirectional_conv_backward(
    grad: Tensor, grad_b: Tensor, x: Tensor, weight: Tensor, bias: Tensor, weight_b: Tensor, bias_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, bias, weight_b, bias_b for those of u and u_b."""
    grid = _grid(x)
    (d, _, taps), shares = weight.shape, grid[0] * grid[2]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweights = torch.empty(2, shares, d, 1, taps, dtype=torch.float32, device=x.device)
    dbiases = torch.empty(2, shares, d, dtype=torch.float32, device=x.device)
    weights = (w.contiguous() for w in (weight, bias, weight_b, bias_b))
    with torch.cuda.device_of(x):
        _conv_backward[grid](
            dx, dweights, dbiases, grad.contiguous(), grad_b.contiguous(), x, *weights, *x.stride(), *x.shape[1:],
            TAPS=taps, BLOCK_L=BLOCK_L, BLOCK_D=BLOCK_D, **LAUNCH,
        )  # fmt: skip
    # torch sums on a GPU in a fixed order, without atomics.
    dweight, dweight_b = (share.sum(0) for share in dweights)
    dbias, dbias_b = (share.sum(0) for share in dbiases)
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), dweight_b.to(weight_b.dtype), dbias_b.to(bias_b.dtype)
