import pytest
import torch

from semivim.layers.ssmixup_readout import SSMIXUP_C, add_crossed_readout, own_readout_weights
from semivim.ops.scan import scan
from tests.ops.scan_cases import bidirectional_inputs, directions_of
from tests.tolerance import assert_close

PSI, NU = torch.tensor([0.0, 0.25, 1.0]), torch.tensor([1.0, 0.4, 0.1])


@pytest.mark.parametrize(
    ("ssmixup_c", "factors"), (("own", (1, 1)), ("fwd", (1, 0)), ("bwd", (0, 1)), ("mean", (0.5, 0.5)))
)
def test_weights_of_the_states_read_by_their_own_c(ssmixup_c, factors):
    weights = own_readout_weights(ssmixup_c, PSI, NU)
    expected = torch.stack([factors[0] * NU * PSI, factors[1] * NU * (1 - PSI)], 1)
    assert_close("weights", weights, expected)


@pytest.mark.parametrize("ssmixup_c", SSMIXUP_C)
def test_no_share_or_no_strength_is_no_mix(ssmixup_c):
    forward, backward = directions_of(bidirectional_inputs(3, 5, 4, 2))
    y = torch.randn(3, 5, 4)
    for psi, nu in ((None, None), (PSI, None), (None, NU)):
        assert own_readout_weights(ssmixup_c, psi, nu) is None
        assert add_crossed_readout(y, ssmixup_c, forward, backward, psi, nu) is y


def test_one_c_for_both_directions_makes_all_choices_equal():
    # Semi-ViM's case: whichever C reads the mixed states, it is the same one.
    forward, backward = directions_of(bidirectional_inputs(3, 9, 4, 2))
    backward = backward._replace(bc=torch.cat([backward.bc[..., :2], forward.bc[..., 2:]], -1))
    zeros = torch.zeros(3, 9, 4)
    s = torch.stack([scan([f._replace(D=torch.zeros(4))]) for f in (forward, backward)], 1)
    read = {}
    for ssmixup_c in SSMIXUP_C:
        own = (own_readout_weights(ssmixup_c, PSI, NU)[:, :, None, None] * s).sum(1) / 2
        read[ssmixup_c] = own + add_crossed_readout(zeros, ssmixup_c, forward, backward, PSI, NU)
    for ssmixup_c in SSMIXUP_C[1:]:
        assert_close(ssmixup_c, read[ssmixup_c], read["own"])
