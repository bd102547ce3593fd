import pytest
import torch

from semivim.ops import Direction, scan_triton
from tests.ops.scan_cases import bidirectional_inputs, directions_of, mixing
from tests.ops.triton_runs import assert_deterministic, compiled, resources
from tests.ops.triton_runs import compiles as compiles

pytestmark = [compiled, pytest.mark.slow]


def vim_operands(b: int, l: int, d: int, n: int = 16, rank: int = 12) -> tuple[list[Direction], torch.Tensor]:
    """Operands as a Vim block has them under autocast: z and bc are parts of wider rows."""
    x = bidirectional_inputs(b, l, d, n, torch.bfloat16)
    x |= {name: torch.zeros(b, l, rank + 2 * n, dtype=torch.bfloat16)[..., rank:] for name in ("bc", "bc_b")}
    return directions_of(x), torch.zeros(b, l, 2 * d, dtype=torch.bfloat16)[..., d:]


@pytest.mark.parametrize(("n", "registers"), ((16, 160), (1, 128)))
def test_a_pair_takes_no_spills_and_no_shared_memory(compiles, tmp_path, n, registers):
    # Shared memory in the walk means that tiles change hands between lanes at every token: see the barriers of old.
    directions, z = vim_operands(64, 197, 384, n)
    scan_triton.forward(directions, z, None, 0.5, True)
    assert set(compiles) == {"pack_rows", "scan_forward"}
    assert_deterministic(compiles)
    used = resources(compiles["scan_forward"], tmp_path)
    assert used["REG"] <= registers
    assert used["STACK"] <= {80: 8, 90: 0}[compiles["scan_forward"].metadata.target.arch]  # spilled bytes a thread
    assert used["SHARED"] == 0
    assert "ld.global.v4.b32" in compiles["scan_forward"].asm["ptx"] or n == 1  # rows come 16 bytes at a time


def test_segments_take_two_more_kernels(compiles):
    directions, z = vim_operands(1, 197, 384)
    scan_triton.forward(directions, z, mixing(1)["mix"], 0.5, True)
    assert set(compiles) == {"pack_rows", "segment_effect", "chain_segments", "scan_forward"}
    assert_deterministic(compiles)


def test_direction_length_and_strides_need_no_kernel_of_their_own(compiles):
    (f, g), z = vim_operands(2, 197, 40, 1)
    scan_triton.forward([f], None, None, 1.0, True)
    known = dict(compiles)
    (f, _), _ = vim_operands(3, 64, 40, 1)
    scan_triton.forward([f._replace(reverse=True, u=z[..., :40], delta=g.delta[:, ::2])], None, None, 1.0, True)
    assert all(compiles[name] is kernel for name, kernel in known.items())
