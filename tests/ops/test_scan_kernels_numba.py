import pytest
import torch

from semivim.ops import scan_kernels_numba as kernels
from semivim.ops.scan_adjoint_numba import backward_scratch
from tests.ops.scan_cases import bidirectional_inputs, bidirectional_scan


@pytest.mark.parametrize("scratch", (kernels.forward_scratch, backward_scratch))
@pytest.mark.parametrize("blocks", (1, 6))
def test_scratch_fields_are_whole_vectors_and_known(scratch, blocks):
    sizes = scratch(blocks, 16)
    assert set(sizes) <= set(kernels.PLACE.names)
    assert all(size % kernels.WIDTH == 0 for size in sizes.values())
    # What grows with the strip is one state per channel, so that a chunk stays in the second cache.
    assert sizes["h"] == blocks * kernels.BLOCK * 16 * 4
    assert {**sizes, "h": 0} == {**scratch(1, 16), "h": 0}


def test_channels_do_not_share_anything_but_weights_of_tokens():
    # A change of one channel's input reaches that channel's output only, in any group and block.
    d = 2 * kernels.BLOCK + 5
    inputs = bidirectional_inputs(1, 70, d, 3)
    out = bidirectional_scan(**inputs, backend="numba")
    for channel in (0, 15, 16, kernels.BLOCK - 1, kernels.BLOCK, d - 1):
        changed = inputs | {"u": inputs["u"].clone()}
        changed["u"][:, 0, channel] += 1
        different = (bidirectional_scan(**changed, backend="numba") != out).any(1)[0].nonzero().flatten()
        assert torch.equal(different, torch.tensor([channel]))
