"""Stand-ins for mamba-ssm 2.3.2 and causal-conv1d 1.7.0: their documented calls in plain torch, on any device.

They check what the CUDA extensions check (dtypes, shapes, strides), so a test with them shows that arguments reach
the right places in the right form. They say nothing about the kernels' own numbers or speed.
"""

import sys
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor


def _recorded(function, tensors, grad):
    with torch.enable_grad():
        leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
        gradients = iter(torch.autograd.grad(function(*leaves), [x for x in leaves if x is not None], grad))
    return [None if x is None else next(gradients) for x in leaves]


class SelectiveScanFn:
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
        (b, d, l), n, g = u.shape, A.shape[1], B.shape[1]
        assert delta.shape == u.shape and A.shape == (d, n) and B.shape == C.shape == (b, g, n, l) and d % g == 0
        assert delta.dtype == B.dtype == C.dtype == u.dtype and A.dtype == torch.float32
        assert all(x.stride(-1) == 1 or l == 1 for x in (u, delta, B, C))
        assert all(x is None or (x.dtype == torch.float32 and x.shape == (d,)) for x in (D, delta_bias))
        assert z is None or (z.dtype == u.dtype and z.shape == u.shape)
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias)
        ctx.delta_softplus = delta_softplus
        return SelectiveScanFn.scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)

    @staticmethod
    def scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> Tensor:
        x, dt = u.float(), delta.float()
        if delta_bias is not None:
            dt = dt + delta_bias[:, None]
        if delta_softplus:
            dt = F.softplus(dt)
        B, C = (row.float().repeat_interleave(u.shape[1] // row.shape[1], 1) for row in (B, C))
        h, y = torch.zeros(*u.shape[:2], A.shape[1]), []
        for t in range(u.shape[2]):
            h = torch.exp(dt[..., t, None] * A) * h + (dt * x)[..., t, None] * B[..., t]
            y.append((h * C[..., t]).sum(-1))
        out = torch.stack(y, -1)
        if D is not None:
            out = out + D[:, None] * x
        if z is not None:
            out = out * F.silu(z.float())
        return out.to(u.dtype)

    @staticmethod
    def backward(ctx, dout, *args):
        assert dout.dtype == ctx.saved_tensors[0].dtype
        gradients = _recorded(
            lambda *tensors: SelectiveScanFn.scan(*tensors, ctx.delta_softplus), ctx.saved_tensors, dout
        )
        return (*gradients, None, None)


class CausalConv1dFn:
    @staticmethod
    def forward(
        ctx,
        x,
        weight,
        bias=None,
        seq_idx=None,
        initial_states=None,
        return_final_states=False,
        final_states_out=None,
        activation=None,
    ):
        assert activation == "silu" and weight.shape[0] == x.shape[1] and 2 <= weight.shape[1] <= 4
        assert bias.dtype == weight.dtype and bias.is_contiguous() and bias.shape == weight.shape[:1]
        if x.stride(2) != 1:
            assert x.stride(1) == 1 and x.shape[1] % 8 == x.stride(2) % 8 == x.stride(0) % 8 == 0
        ctx.save_for_backward(x, weight, bias)
        return torch.empty_like(x).copy_(CausalConv1dFn.conv(x, weight, bias))

    @staticmethod
    def conv(x, weight, bias) -> Tensor:
        padded = F.pad(x.float(), [weight.shape[1] - 1, 0])
        return F.silu(F.conv1d(padded, weight[:, None].float(), bias.float(), groups=weight.shape[0])).to(x.dtype)

    @staticmethod
    def backward(ctx, dout, *args):
        return (*_recorded(CausalConv1dFn.conv, ctx.saved_tensors, dout), None, None, None, None, None)


def install(monkeypatch) -> None:
    """Let imports find the stand-ins, for one test."""
    for path, holder in (
        ("mamba_ssm.ops.selective_scan_interface", SelectiveScanFn),
        ("causal_conv1d.causal_conv1d_interface", CausalConv1dFn),
    ):
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        setattr(sys.modules[path], holder.__name__, holder)
    for name in ("scan_cuda", "conv_cuda"):
        # Import them anew now, and forget them with the stand-ins.
        monkeypatch.delitem(sys.modules, f"semivim.ops.{name}", raising=False)
        monkeypatch.delattr(f"semivim.ops.{name}", raising=False)
