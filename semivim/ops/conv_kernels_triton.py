"""Triton kernels of the causal depthwise convolution with SiLU, one direction or both, forward and backward.

Dimensions: b images, l tokens, d channels, k taps (TAPS), LAST = TAPS - 1. A program walks `segment` tokens of some
channels of one image and reads each row once: row m of x finishes the causal u[m] and the anti-causal u_b[m - LAST].
Taps and the last rows stay in registers. Sums are float32.
"""
# mypy: ignore-errors
# Triton reads its kernels, not Python: arguments are pointers or tiles.

import triton
import triton.language as tl

# Rows that begin at 16 bytes are loaded in vectors: Triton specialises on x, its strides and the gradients.
UNALIGNED = ("weight", "weight_b", "bias", "bias_b")
INTEGERS = ("l", "segment", "shares")


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp2(-x * 1.4426950408889634))


@triton.jit
def _load_row(x, t, l, here, x_token):
    return tl.load(x + t * x_token, mask=here & (t >= 0) & (t < l), other=0)


@triton.jit
def _load_taps(weight, bias, channel, here, TAPS: tl.constexpr):
    taps = ()
    for j in tl.static_range(TAPS):
        taps = taps + (tl.load(weight + channel * TAPS + j, mask=here, other=0).to(tl.float32),)
    return taps, tl.load(bias + channel, mask=here, other=0).to(tl.float32)


@triton.jit
def _load_window(x, low, l, here, x_token, LAST: tl.constexpr):
    window = ()
    for k in tl.static_range(LAST):
        window = window + (_load_row(x, low - LAST + k, l, here, x_token).to(tl.float32),)
    return window


@triton.jit
def _convolve(taps, bias, window, k: tl.constexpr, BACK: tl.constexpr):
    """The convolution before SiLU that the newest row window[k + LAST] finishes."""
    total = bias
    for j in tl.static_range(len(taps)):
        total += taps[j] * window[k + len(taps) - 1 - j if BACK else k + j]
    return total


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=UNALIGNED)
def conv_forward(  # noqa: PLR0913
    u, u_b, x, weight, weight_b, bias, bias_b, x_image, x_token, l, segment,
    d: tl.constexpr, TAPS: tl.constexpr, AHEAD: tl.constexpr, BACK: tl.constexpr,
    BLOCK_D: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Write u (AHEAD) and u_b (BACK), ``(b, l, d)``; rows are loaded T at a time."""
    LAST: tl.constexpr = TAPS - 1
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    image = tl.program_id(2).to(tl.int64)
    here = channel < d
    low = tl.program_id(0) * segment
    high = tl.minimum(l, low + segment)
    x += image * x_image + channel
    if AHEAD:
        u += image * l * d + channel
        taps, offset = _load_taps(weight, bias, channel, here, TAPS)
    if BACK:
        u_b += image * l * d + channel
        taps_b, offset_b = _load_taps(weight_b, bias_b, channel, here, TAPS)
    window = _load_window(x, low, l, here, x_token, LAST)
    for start in range(low, high + LAST if BACK else high, T):
        raws = ()
        for k in tl.static_range(T):
            raws = raws + (_load_row(x, start + k, l, here, x_token),)
        for k in tl.static_range(T):
            m = start + k
            window = window + (raws[k].to(tl.float32),)
            if AHEAD:
                c = _convolve(taps, offset, window, k, False)
                tl.store(u + m * d, c * sigmoid(c), mask=here & (m < high))
            if BACK:
                c_b = _convolve(taps_b, offset_b, window, k, True)
                done = m - LAST
                tl.store(u_b + done * d, c_b * sigmoid(c_b), mask=here & (done >= low) & (done < high))
        window = window[T:]


@triton.jit
def _gradient(grad, c):
    """Gradient of the convolution before SiLU."""
    slope = sigmoid(c)
    return grad.to(tl.float32) * (slope * (1 + c * (1 - slope)))


@triton.jit
def _add_products(sums, own, window, k: tl.constexpr, BACK: tl.constexpr):
    """Add a row's share to the gradients of taps and bias."""
    new = ()
    for j in tl.static_range(len(sums) - 1):
        new = new + (sums[j] + own * window[k + len(sums) - 2 - j if BACK else k + j],)
    return new + (sums[len(sums) - 1] + own,)


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=UNALIGNED)
def conv_backward(  # noqa: C901, PLR0913
    dx, dweights, grad, grad_b, x, weight, weight_b, bias, bias_b, x_image, x_token, l, segment,
    d: tl.constexpr, TAPS: tl.constexpr, AHEAD: tl.constexpr, BACK: tl.constexpr,
    BLOCK_D: tl.constexpr, T: tl.constexpr, DX_ROW: tl.constexpr,
):  # fmt: skip
    """Write dx ``(b, l, d)``, its rows DX_ROW apart, and a share of the weights' gradients.

    These are ``(directions, shares, TAPS + 1, d)``, the bias last.

    Row m finishes the gradients before SiLU own[m] (of u) and own_b[m - LAST] (of u_b), and dx[m - LAST].
    """
    LAST: tl.constexpr = TAPS - 1
    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    image = tl.program_id(2).to(tl.int64)
    here = channel < d
    low = tl.program_id(0) * segment
    high = tl.minimum(l, low + segment)
    zero = tl.zeros((BLOCK_D,), tl.float32)
    x += image * x_image + channel
    dx += image * l * DX_ROW + channel
    own, own_b, sums, sums_b = (), (), (), ()
    for _ in tl.static_range(LAST):
        own, own_b = own + (zero,), own_b + (zero,)
    for _ in tl.static_range(TAPS + 1):
        sums, sums_b = sums + (zero,), sums_b + (zero,)
    if AHEAD:
        grad += image * l * d + channel
        taps, offset = _load_taps(weight, bias, channel, here, TAPS)
    if BACK:
        grad_b += image * l * d + channel
        taps_b, offset_b = _load_taps(weight_b, bias_b, channel, here, TAPS)
    window = _load_window(x, low, l, here, x_token, LAST)
    for start in range(low, high + LAST, T):
        raws, grads, grads_b = (), (), ()
        for k in tl.static_range(T):
            raws = raws + (_load_row(x, start + k, l, here, x_token),)
            if AHEAD:
                grads = grads + (_load_row(grad, start + k, l, here, d),)
            if BACK:
                grads_b = grads_b + (_load_row(grad_b, start + k - LAST, l, here, d),)
        for k in tl.static_range(T):
            m = start + k
            done = m - LAST
            window = window + (raws[k].to(tl.float32),)
            total = zero
            if AHEAD:  # x[done] goes into u[done + LAST - j] by tap j
                own = own + (_gradient(grads[k], _convolve(taps, offset, window, k, False)),)
                for j in tl.static_range(TAPS):
                    total += taps[j] * own[k + LAST - j]
                sums = _add_products(sums, tl.where(m < high, own[k + LAST], 0.0), window, k, False)
            if BACK:  # and into u_b[done - LAST + j]
                ours = (done >= low) & (done < high)
                own_b = own_b + (_gradient(grads_b[k], _convolve(taps_b, offset_b, window, k, True)),)
                for j in tl.static_range(TAPS):
                    total += taps_b[j] * own_b[k + j]
                sums_b = _add_products(sums_b, tl.where(ours, own_b[k + LAST], 0.0), window, k, True)
            tl.store(dx + done * DX_ROW, total, mask=here & (done >= low) & (done < high))
        window = window[T:]
        own = own[T:] if AHEAD else own
        own_b = own_b[T:] if BACK else own_b
    at = dweights + (image * tl.num_programs(0) + tl.program_id(0)) * ((TAPS + 1) * d) + channel
    at_b = at
    if AHEAD:
        at_b += tl.num_programs(2).to(tl.int64) * tl.num_programs(0) * ((TAPS + 1) * d)
    for j in tl.static_range(TAPS + 1):
        if AHEAD:
            tl.store(at + j * d, sums[j], mask=here)
        if BACK:
            tl.store(at_b + j * d, sums_b[j], mask=here)


@triton.jit(do_not_specialize=INTEGERS)
def sum_shares(
    dweight, dweight_b, dbias, dbias_b, dweights, shares,
    d: tl.constexpr, TAPS: tl.constexpr, COLUMNS: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """Sum the shares of COLUMNS gradients of a direction's weights, in a fixed order."""
    WIDTH: tl.constexpr = (TAPS + 1) * d
    if tl.program_id(1) == 1:
        dweight, dbias = dweight_b, dbias_b
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    share = tl.arange(0, SHARES)[:, None]
    at = dweights + (tl.program_id(1).to(tl.int64) * shares + share) * WIDTH + column[None, :]
    total = tl.zeros((SHARES, COLUMNS), tl.float32)
    for first in range(0, shares, SHARES):
        total += tl.load(at, mask=(first + share < shares) & (column < WIDTH)[None, :], other=0)
        at += SHARES * WIDTH
    sums = tl.sum(total, 0)
    tap, channel = column // d, column % d
    tl.store(dweight + channel * TAPS + tap, sums, mask=tap < TAPS)
    tl.store(dbias + channel, sums, mask=tap == TAPS)
