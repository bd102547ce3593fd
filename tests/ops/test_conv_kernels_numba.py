import pytest

from semivim.ops import conv_kernels_numba as kernels
from semivim.ops.conv_numba import ring_size


@pytest.mark.parametrize("taps", range(1, 10))
def test_the_ring_holds_every_tap_and_wraps_by_bits(taps):
    ring = ring_size(taps)
    assert ring >= taps
    assert ring & (ring - 1) == 0
    assert kernels.ring_scratch(ring) == 2 * ring * kernels.BLOCK * 4
