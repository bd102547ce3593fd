"""All of Vim's mixer between its outer projections as one differentiable function, for eager mode.

Convolution, projections and scan of one direction or both, by the same backends as the ops `causal_conv` and `scan`,
with one autograd node for all: less host time, no masks and sums of gradients of slices, and no step sizes kept for the
backward (they are cheap to compute again). `semivim.layers.BidirectionalMamba` takes it where `is_eager` says so.

Dimensions: b images, l tokens, e channels, n states, r rank of the step size.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import choose
from .causal_conv import causal_conv
from .eager import cast, differentiable_gradients
from .linear import add_product, linear
from .scan import scan
from .scan_reference import Direction

_BYTES_TOGETHER = 1 << 20  # of a tensor (b, l, e) for each thread, in `_in_groups`


class DirectionWeights(NamedTuple):
    """Weights of one direction of the mixer, or their gradients."""

    conv_weight: Tensor  # (e, 1, k), taps of the causal convolution
    conv_bias: Tensor  # (e,)
    x_proj: Tensor  # (r + 2n, e), to [dt | B | C]
    dt_proj: Tensor  # (e, r)
    dt_bias: Tensor  # (e,)
    A_log: Tensor  # (e, n), A = -exp(A_log)
    D: Tensor  # (e,)


def decay_rate(A_log: Tensor) -> Tensor:
    """``A = -exp(A_log)``, in float32 whatever the model's dtype (float64 stays)."""
    wide = A_log if A_log.dtype == torch.float64 else A_log.float()
    return -torch.exp(wide)


def _product_dtype(xz: Tensor) -> torch.dtype:
    """Dtype of the projections: autocast's where it is on."""
    device = xz.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else xz.dtype


def _direction(u: Tensor, dbc: Tensor, w: DirectionWeights, reverse: bool) -> Direction:
    """Operands of one direction's scan, from its convolved tokens and their projection [dt | B | C]."""
    rank = w.dt_proj.shape[1]
    delta = linear(dbc[..., :rank], cast(w.dt_proj, dbc.dtype))
    return Direction(u, delta, dbc[..., rank:], decay_rate(w.A_log), w.D, w.dt_bias, reverse)


def _forward(
    xz: Tensor, mix: Tensor | None, scale: float, weights: list[DirectionWeights], reverse: list[bool]
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], tuple[Any, Any]]:
    """Return the output, what the scan saves, u and [dt | B | C] of each direction, and both backends."""
    x, z = xz.chunk(2, -1)
    device, dtype = xz.device, xz.dtype
    conv, scan = choose("conv", "auto", device, dtype), choose("scan", "auto", device, dtype)
    us = conv.forward(x, [(w.conv_weight, w.conv_bias) for w in weights], reverse)
    dtype = _product_dtype(xz)
    dbcs = [linear(cast(u, dtype), cast(w.x_proj, dtype)) for u, w in zip(us, weights, strict=True)]
    directions = [_direction(u, dbc, w, back) for u, dbc, w, back in zip(us, dbcs, weights, reverse, strict=True)]
    out, saved = scan.forward(directions, z, mix, scale, True)
    return out, saved, us, dbcs, (conv, scan)


def _images_together(xz: Tensor) -> int:
    """Return how many images to mix at once where nothing is kept for a backward: all of them on a GPU."""
    images, tokens, width = xz.shape
    if xz.device.type != "cpu":
        return images
    most = max(1, _BYTES_TOGETHER * torch.get_num_threads() // (tokens * (width // 2) * xz.itemsize))
    groups = -(-images // most)
    return -(-images // groups)  # of one size


def _in_groups(
    xz: Tensor, mix: Tensor | None, scale: float, weights: list[DirectionWeights], reverse: list[bool]
) -> Tensor:
    """Return the output alone, computed for some images after the others, as the memory of one group serves the next.

    Tensors of a large batch are too large for malloc to keep: it returns them to the system, which hands them out again
    as empty pages one by one, for up to a third of the time.
    """
    together = _images_together(xz)
    if together >= xz.shape[0]:
        return _forward(xz, mix, scale, weights, reverse)[0]
    out = xz.new_empty(*xz.shape[:2], xz.shape[2] // 2)
    parts = xz.split(together)
    mixes = [None] * len(parts) if mix is None else mix.split(together)
    for part, of, part_mix in zip(parts, out.split(together), mixes, strict=True):
        of.copy_(_forward(part, part_mix, scale, weights, reverse)[0])
    return out


def _split(tensors: Sequence[Tensor]) -> list[DirectionWeights]:
    """Sort tensors by direction."""
    size = len(DirectionWeights._fields)
    return [DirectionWeights(*tensors[i : i + size]) for i in range(0, len(tensors), size)]


def _keeps_convolved(xz: Tensor) -> bool:
    """Whether the convolved tokens are kept for the backward.

    On a GPU they are computed again: a fifth of a training step's memory for two hundredths of its time.
    """
    return xz.device.type == "cpu"


class _Mixer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, xz: Tensor, mix: Tensor | None, scale: float, reverse: list[bool], *tensors: Tensor
    ) -> Tensor:
        out, saved, us, dbcs, ctx.backends = _forward(xz, mix, scale, _split(tensors), reverse)
        ctx.scale, ctx.reverse = scale, reverse
        kept = us if _keeps_convolved(xz) else [None] * len(us)
        ctx.save_for_backward(xz, mix, saved, *kept, *dbcs, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors  # read once, as checkpointing wants it
        reverse = ctx.reverse
        count = len(reverse)
        xz, mix, saved = kept[:3]
        us, dbcs, tensors = kept[3 : 3 + count], kept[3 + count : 3 + 2 * count], kept[3 + 2 * count :]
        weights = _split(tensors)
        if torch.is_grad_enabled():  # by create_graph: the gradients are to be differentiated themselves

            def by_ops(xz: Tensor, *tensors: Tensor) -> Tensor:
                return _by_ops(xz, mix, ctx.scale, _split(tensors), reverse, dbcs[0].dtype)

            dxz, *gradients = differentiable_gradients(by_ops, [xz, *tensors], grad)
            return dxz, None, None, None, *gradients
        conv, scan = ctx.backends
        x, z = xz.chunk(2, -1)
        taps = [(w.conv_weight, w.conv_bias) for w in weights]
        if not _keeps_convolved(xz):
            us = conv.forward(x, taps, reverse)
        directions = [_direction(u, dbc, w, back) for u, dbc, w, back in zip(us, dbcs, weights, reverse, strict=True)]
        dxz = torch.empty(*xz.shape, dtype=xz.dtype, device=xz.device)
        dx, dz = dxz.chunk(2, -1)
        gradients, _ = scan.backward(grad, directions, z, mix, ctx.scale, True, saved, dz)
        dus, of_weights = [], []
        for f, of, dbc, w in zip(directions, gradients, dbcs, weights, strict=True):
            du, dx_proj, ddt_proj = _projections_backward(f, of, dbc, w)
            dus.append(du)
            of_weights.append([dx_proj, ddt_proj, of.delta_bias, cast(of.A * f.A, w.A_log.dtype), of.D])
        _, of_conv = conv.backward(dus, x, taps, reverse, dx)
        flat = [g for pair, rest in zip(of_conv, of_weights, strict=True) for g in (*pair, *rest)]
        return dxz, None, None, None, *flat


def _by_ops(
    xz: Tensor,
    mix: Tensor | None,
    scale: float,
    weights: list[DirectionWeights],
    reverse: list[bool],
    dtype: torch.dtype,
) -> Tensor:
    """The same output by the registered ops, which can be differentiated twice; `dtype` is that of the projections."""
    x, z = xz.chunk(2, -1)
    us = causal_conv(x, [(w.conv_weight, w.conv_bias) for w in weights], reverse)
    directions = [
        _direction(u, linear(cast(u, dtype), cast(w.x_proj, dtype)), w, back)
        for u, w, back in zip(us, weights, reverse, strict=True)
    ]
    return scan(directions, z, mix, scale)


def _projections_backward(
    f: Direction, of: Direction, dbc: Tensor, w: DirectionWeights
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of u (the scan's and the projection's together), x_proj and dt_proj of one direction."""
    dtype, rank = dbc.dtype, w.dt_proj.shape[1]
    ddelta = of.delta.flatten(0, 1)
    ddbc = torch.cat([ddelta @ cast(w.dt_proj, dtype), of.bc.flatten(0, 1)], -1)
    ddt_proj = ddelta.t() @ dbc[..., :rank].flatten(0, 1)
    dx_proj = ddbc.t() @ cast(f.u.flatten(0, 1), dtype)
    du = add_product(of.u.flatten(0, 1), ddbc, cast(w.x_proj, dtype)).view_as(of.u)
    return du, cast(dx_proj, w.x_proj.dtype), cast(ddt_proj, w.dt_proj.dtype)


def _check(xz: Tensor, mix: Tensor | None, weights: list[DirectionWeights]) -> None:
    """Name what does not fit: the backends read raw memory."""
    b, inner, device = xz.shape[0], xz.shape[-1] // 2, xz.device
    rank, n, taps = weights[0].dt_proj.shape[1], weights[0].A_log.shape[1], weights[0].conv_weight.shape[2]
    wanted = [(inner, 1, taps), (inner,), (rank + 2 * n, inner), (inner, rank), (inner,), (inner, n), (inner,)]
    tensors = [x for w in weights for x in w]
    # All at once first: to look at each costs a small block a tenth of its time.
    if [x.shape for x in tensors] != wanted * len(weights) or {x.device for x in tensors} != {device}:
        for name, x, shape in zip(DirectionWeights._fields * len(weights), tensors, wanted * len(weights), strict=True):
            if x.shape != shape:
                raise ValueError(f"{name} must be {shape}, got {tuple(x.shape)}")
            if x.device != device:
                raise ValueError(f"{name} must be on {device} as xz is, got {x.device}")
    if mix is not None and (mix.shape != (b, len(weights)) or mix.device != xz.device):
        raise ValueError(
            f"mix must be (b, K) = {(b, len(weights))} on {xz.device}, got {tuple(mix.shape)} on {mix.device}: "
            "psi and nu must be (b,)"
        )


def mix_tokens(
    xz: Tensor, weights: list[DirectionWeights], reverse: list[bool], mix: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """Convolve, project and scan tokens in one direction or several.

    Args:
        xz: Tokens and their gate, ``(b, l, 2e)``: the input projection's output.
        weights: Weights of each direction.
        reverse: Whether a direction goes from the last token to the first.
        mix: Weight of each direction's ungated read-out, ``(b, K)``; no gradient.
        scale: Factor of the sum (see `semivim.ops.scan.scan`).

    Returns:
        ``(b, l, e)``, in the dtype of ``xz``.

    Raises:
        ValueError: If a shape or device does not fit.

    Source: Zhu et al. 2024 (arXiv:2401.09417), Algorithm 1; Semi-ViM Eq. (14)-(16).
    """
    _check(xz, mix, weights)
    if xz.numel() == 0:
        return _by_ops(xz, mix, scale, weights, reverse, _product_dtype(xz))
    if torch.is_grad_enabled():
        return _Mixer.apply(xz, mix, scale, reverse, *(tensor for w in weights for tensor in w))
    return _in_groups(xz, mix, scale, weights, reverse)
