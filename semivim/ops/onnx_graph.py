"""The scan and the convolution as torch operations that the ONNX exporter knows: a scan becomes one Scan node.

Only for tracing. Run as they are, these are as slow as the token loop; the exported graph runs in onnxruntime.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .scan_reference import Direction, direction_of, operands_of


def causal_conv(x: Tensor, weights: list[tuple[Tensor, Tensor]], reverse: list[bool]) -> list[Tensor]:
    """As `semivim.ops.causal_conv`, by torch's depthwise convolution."""
    x = x.transpose(1, 2)
    outputs = []
    for (weight, bias), back in zip(weights, reverse, strict=True):
        channels, _, taps = weight.shape
        padded = F.pad(x, [0, taps - 1] if back else [taps - 1, 0])
        taps_in_order = weight.flip(-1) if back else weight
        outputs.append(F.silu(F.conv1d(padded, taps_in_order, bias, groups=channels)).transpose(1, 2))
    return outputs


def _turned(x: Tensor, f: Direction) -> Tensor:
    return x.flip(1) if f.reverse else x


def scan(
    directions: list[Direction],
    z: Tensor | None = None,
    mix: Tensor | None = None,
    scale: float = 1.0,
    delta_softplus: bool = True,
) -> Tensor:
    """As `semivim.ops.scan.scan`, by torch's scan over all directions at once."""
    if torch.jit.is_tracing():
        raise ValueError(
            "the legacy ONNX exporter cannot translate a scan: give torch.onnx.export dynamo=True "
            "(timm's onnx_export.py: --dynamo)"
        )
    # A prototype of torch with no public name yet; an older torch lacks it, and only the export with it.
    from torch._higher_order_ops.scan import scan as torch_scan

    dtype, (d, n) = directions[0].u.dtype, directions[0].A.shape
    wide = directions[0].A.dtype
    # Detached, as the exporter cannot translate a scan that autograd records.
    directions = [direction_of((x.detach().to(wide) for x in operands_of(f)), f.reverse) for f in directions]
    dt = [F.softplus(f.delta + f.delta_bias) if delta_softplus else f.delta + f.delta_bias for f in directions]
    # Each direction is an image more in the batch, a backward one flipped: (l, K, b, channels).
    over_tokens = tuple(
        torch.stack([_turned(x, f) for x, f in zip(rows, directions, strict=True)]).movedim(2, 0)
        for rows in (
            dt,
            [step * f.u for step, f in zip(dt, directions, strict=True)],
            [f.bc for f in directions],
        )
    )
    rates = torch.stack([f.A for f in directions])

    def step(h: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        step_size, driven, weights = now
        # Inside, the exporter knows no size of a captured tensor: without them it cannot broadcast.
        decay = torch.exp(step_size.unsqueeze(-1) * rates.reshape(len(directions), 1, d, n))
        h = decay * h + driven.unsqueeze(-1) * weights[..., None, :n]
        return h, (h * weights[..., None, n:]).sum(-1)

    start = torch.zeros(len(directions), directions[0].u.shape[0], d, n, dtype=wide, device=rates.device)
    _, read = torch_scan(step, start, over_tokens)
    s = [_turned(read[:, k].transpose(0, 1), f) for k, f in enumerate(directions)]
    terms = [s_k + f.D * f.u for s_k, f in zip(s, directions, strict=True)]
    y = sum(terms[1:], terms[0])
    if z is not None:
        y = F.silu(z.to(wide)) * y
    if mix is not None:
        for k, s_k in enumerate(s):
            y = y + mix[:, k].to(wide).view(-1, 1, 1) * s_k
    return (scale * y).to(dtype)
