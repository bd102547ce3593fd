import pytest
import torch

from semivim.ops import scan_triton
from tests.ops.scan_cases import bidirectional_inputs, forward_of, gradients_of, mixing
from tests.ops.triton_runs import assert_deterministic, compiled
from tests.ops.triton_runs import compiles as compiles

pytestmark = [compiled, pytest.mark.slow]


def vim_operands(b, l, d, n=16, rank=12, dtype=torch.bfloat16):
    """Operands as a Vim block has them under autocast: z and bc are parts of wider rows."""
    x = bidirectional_inputs(b, l, d, n, dtype)
    x["z"] = torch.zeros(b, l, 2 * d, dtype=dtype)[..., d:]
    x |= {name: torch.zeros(b, l, rank + 2 * n, dtype=dtype)[..., rank:] for name in ("bc", "bc_b")}
    return x


@pytest.mark.parametrize("b", [64, 1], ids=["whole", "segmented"])
def test_bidirectional_kernels_compile_without_atomics(compiles, b):
    operands = (*vim_operands(b, 197, 384).values(), *mixing(b).values())
    out, states = forward_of(scan_triton, *operands)
    gradients_of(scan_triton, out, *operands, states)
    assert {"bidirectional_forward", "scan_backward", "gate_backward"} <= set(compiles)
    assert ("segment_effect" in compiles) == (b == 1)
    assert_deterministic(compiles)


@pytest.mark.parametrize("n", [1, 64])
def test_selective_kernels_compile_for_any_number_of_states(compiles, n):
    x = vim_operands(1, 100, 40, n, dtype=torch.float32)
    B, C = x["bc"].chunk(2, -1)
    operands = (x["u"], x["delta"], x["A"], B, C, x["D"], x["z"], x["delta_bias"], True, True)
    out, states = scan_triton.selective_scan_forward(*operands)
    scan_triton.selective_scan_backward(out, *operands, states)
    assert {"selective_forward", "scan_backward"} <= set(compiles)
    assert_deterministic(compiles)
