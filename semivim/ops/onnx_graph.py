"""The mixer's ops as torch operations that the ONNX exporter knows: a scan becomes one Scan node.

Only for tracing. Run as they are, these are as slow as the token loop; the exported graph runs in onnxruntime.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def bidirectional_conv(
    x: Tensor, weight: Tensor, bias: Tensor, weight_b: Tensor, bias_b: Tensor
) -> tuple[Tensor, Tensor]:
    """As `semivim.ops.bidirectional_conv`, by two depthwise convolutions."""
    channels, _, taps = weight.shape
    x = x.transpose(1, 2)
    ahead = F.conv1d(F.pad(x, [taps - 1, 0]), weight, bias, groups=channels)
    back = F.conv1d(F.pad(x, [0, taps - 1]), weight_b.flip(-1), bias_b, groups=channels)
    return F.silu(ahead).transpose(1, 2), F.silu(back).transpose(1, 2)


def bidirectional_scan(
    u: Tensor,
    u_b: Tensor,
    delta: Tensor,
    delta_b: Tensor,
    bc: Tensor,
    bc_b: Tensor,
    z: Tensor,
    A: Tensor,
    A_b: Tensor,
    D: Tensor,
    D_b: Tensor,
    delta_bias: Tensor,
    delta_bias_b: Tensor,
    psi: Tensor | None = None,
    nu: Tensor | None = None,
) -> Tensor:
    """As `semivim.ops.bidirectional_scan`, by torch's scan over both directions at once."""
    # A prototype of torch with no public name yet; an older torch lacks it, and only the export with it.
    from torch._higher_order_ops.scan import scan

    d, n = A.shape
    dtype = u.dtype
    # Detached, as the exporter cannot translate a scan that autograd records.
    u, u_b, delta, delta_b, bc, bc_b, z, D, D_b, delta_bias, delta_bias_b, A, A_b = (
        x.detach().to(A.dtype) for x in (u, u_b, delta, delta_b, bc, bc_b, z, D, D_b, delta_bias, delta_bias_b, A, A_b)
    )
    steps = [F.softplus(step + bias) for step, bias in ((delta, delta_bias), (delta_b, delta_bias_b))]
    # The backward direction is a second image in the batch, flipped: (l, 2, b, channels) each.
    both = [
        torch.stack([ahead, back.flip(1)]).movedim(2, 0)
        for ahead, back in ((steps[0], steps[1]), (steps[0] * u, steps[1] * u_b), (bc, bc_b))
    ]
    rates = torch.stack([A, A_b])

    def step(h: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        step_size, driven, weights = now
        # Inside, the exporter knows no size of a captured tensor: without them it cannot broadcast.
        decay = torch.exp(step_size.unsqueeze(-1) * rates.reshape(2, 1, d, n))
        h = decay * h + driven.unsqueeze(-1) * weights[..., None, :n]
        return h, (h * weights[..., None, n:]).sum(-1)

    start = torch.zeros(2, u.shape[0], d, n, dtype=rates.dtype, device=u.device)
    _, read = scan(step, start, tuple(both))
    s, s_b = read[:, 0].transpose(0, 1), read[:, 1].flip(0).transpose(0, 1)
    y = F.silu(z) * (s + D * u + s_b + D_b * u_b)
    if psi is not None and nu is not None:
        y = y + nu.view(-1, 1, 1) * (psi.view(-1, 1, 1) * s + (1 - psi.view(-1, 1, 1)) * s_b)
    return (y / 2).to(dtype)
