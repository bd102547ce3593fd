import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from semivim.data.ssmixup import (
    cutmix_boxes,
    mix_inputs,
    mix_probabilistic,
    mix_targets,
    mixing_weight,
    pair_retained,
)
from tests.tolerance import assert_close


@given(st.lists(st.booleans(), max_size=12), st.integers(0, 2**31))
def test_pairs_stay_among_the_retained_and_skip_oneself(keep, seed):
    mask = torch.tensor(keep, dtype=torch.bool)
    torch.manual_seed(seed)
    partner = pair_retained(mask)
    rows = torch.arange(len(keep))
    assert sorted(partner.tolist()) == rows.tolist()
    assert torch.equal(partner[~mask], rows[~mask])
    if mask.sum() >= 2:
        assert mask[partner[mask]].all()
        assert (partner[mask] != rows[mask]).all()
    else:
        assert torch.equal(partner, rows)


def test_pairs_follow_the_seed_and_vary():
    def pairs(seed):
        torch.manual_seed(seed)
        return pair_retained(torch.ones(16, dtype=torch.bool))

    assert torch.equal(pairs(1), pairs(1))
    assert not torch.equal(pairs(1), pairs(2))


def test_every_other_row_is_equally_likely_as_partner():
    keep = torch.tensor([True, False, True, True, True])
    partners = torch.stack([pair_retained(keep) for _ in range(3000)])[:, 0]
    counts = torch.bincount(partners, minlength=5)
    assert counts[0] == counts[1] == 0
    assert counts[2:].min() > 900, counts


def test_pairing_compiles_to_one_graph_for_any_mask():
    compiled = torch.compile(pair_retained, fullgraph=True, backend="eager")
    for keep in ([True, True, False, True], [False] * 4):
        mask = torch.tensor(keep)
        torch.manual_seed(0)
        expected = pair_retained(mask)
        torch.manual_seed(0)
        assert torch.equal(compiled(mask), expected)


def test_weight_is_the_share_of_confidence_and_detached():
    confidence = torch.tensor([0.875, 0.5], dtype=torch.bfloat16, requires_grad=True)
    weight = mixing_weight(confidence, torch.tensor([0.625, 0.5]))
    assert_close("psi", weight, torch.tensor([0.875 / 1.5, 0.5]))
    assert weight.dtype == torch.float32
    assert not weight.requires_grad


def test_inputs_and_targets_follow_equation_13():
    images = torch.randn(3, 2, 4, 5)
    partner = torch.tensor([2, 1, 0])
    weight = torch.tensor([0.25, 0.5, 0.75])
    mixed = mix_inputs(images, partner, weight)
    assert_close("x_0", mixed[0], 0.25 * images[0] + 0.75 * images[2])
    assert_close("x_1", mixed[1], images[1])
    assert_close("x_2", mixed[2], 0.75 * images[2] + 0.25 * images[0])
    assert mix_inputs(images.bfloat16(), partner, weight).dtype == torch.bfloat16

    targets = mix_targets(torch.tensor([0, 3, 1]), partner, weight, num_classes=4)
    expected = torch.tensor([[0.25, 0.75, 0, 0], [0, 0, 0, 1.0], [0.25, 0.75, 0, 0]])
    assert_close("y", targets, expected)


def test_targets_of_equal_pseudo_labels_stay_one_hot_and_are_detached():
    weight = torch.tensor([0.3, 0.7], requires_grad=True)
    targets = mix_targets(torch.tensor([2, 2]), torch.tensor([1, 0]), weight, num_classes=3)
    assert_close("y", targets, torch.tensor([[0, 0, 1.0]] * 2))
    assert not targets.requires_grad


def test_soft_labels_are_mixed_as_distributions():
    soft = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]], requires_grad=True)
    targets = mix_targets(soft, torch.tensor([1, 0]), torch.tensor([0.25, 0.5]), num_classes=3)
    assert_close("y", targets, torch.tensor([[0.175, 0.425, 0.4], [0.35, 0.35, 0.3]]))
    assert not targets.requires_grad


def test_smoothing_spreads_over_all_classes():
    targets = mix_targets(torch.tensor([1]), torch.tensor([0]), torch.tensor([0.5]), num_classes=5, smoothing=0.1)
    assert_close("y", targets, torch.tensor([[0.02, 0.92, 0.02, 0.02, 0.02]]))


@given(st.integers(1, 33), st.integers(1, 33), st.floats(0, 1), st.integers(0, 2**31))
def test_box_leaves_its_share_outside(height, width, weight, seed):
    torch.manual_seed(seed)
    box, share = cutmix_boxes(torch.full((6,), weight), height, width)
    assert box.shape == (6, 1, height, width)
    assert_close("share", share, 1 - box.float().mean(dim=(1, 2, 3)))
    # A clipped or rounded box is smaller than asked for, never larger.
    assert (share >= weight - 1e-6).all()
    rows, columns = box.any(dim=3), box.any(dim=2)
    assert torch.equal(box, rows[..., None] & columns[:, :, None])


def test_large_boxes_have_about_the_share_asked_for():
    _, share = cutmix_boxes(torch.full((4000,), 0.75), 64, 64)
    inside = 1 - share
    assert inside.max().item() == pytest.approx(0.25, abs=0.01)
    # Mean of the clipped area: (E[side])^2 with E[side] = 1/2 * (1 - 1/8), centre uniform.
    assert inside.mean().item() == pytest.approx((0.5 * (1 - 0.125)) ** 2, abs=0.01)


def _probabilistic(switch_prob, b=64, smoothing=0.0):
    images = torch.arange(b, dtype=torch.float32).view(b, 1, 1, 1).expand(b, 1, 16, 16).contiguous()
    confidence = torch.linspace(0.2, 1.0, b)
    pseudo = torch.arange(b)
    return images, confidence, mix_probabilistic(images, pseudo, confidence, b, switch_prob, smoothing)


def _partners(targets):
    """Read the partner of each row off its target."""
    partners = []
    for row, target in enumerate(targets):
        others = [k for k in target.nonzero().flatten().tolist() if k != row]
        assert len(others) <= 1
        partners.append(others[0] if others else None)
    return partners


@pytest.mark.parametrize("switch_prob", [0.0, 1.0])
def test_probabilistic_mixup_keeps_image_target_and_partner_together(switch_prob):
    images, confidence, mixed = _probabilistic(switch_prob)
    assert_close("sum", mixed.targets.sum(1), torch.ones(64))
    for row, partner in enumerate(_partners(mixed.targets)):
        if partner is None:
            continue
        weight = mixed.targets[row, row]
        mean = weight * row + (1 - weight) * partner
        assert mixed.images[row].mean().item() == pytest.approx(mean.item(), rel=1e-5)
        assert mixed.partner[row] == partner
        if switch_prob == 0:
            share = confidence[row] / (confidence[row] + confidence[partner])
            assert weight.item() == pytest.approx(share.item(), abs=1e-6)
            assert mixed.images[row].std() < 1e-4
        else:
            assert set(mixed.images[row].unique().tolist()) <= {float(row), float(partner)}


def test_probabilistic_mixup_switches_by_image():
    _, _, mixed = _probabilistic(0.5, b=400)
    blended = sum(1 for image in mixed.images if (image != image.round()).any())
    assert 150 < blended < 250


def test_probabilistic_mixup_smooths_both_labels():
    _, _, mixed = _probabilistic(0.5, smoothing=0.1)
    assert_close("sum", mixed.targets.sum(1), torch.ones(64))
    assert mixed.targets.min().item() == pytest.approx(0.1 / 64, rel=1e-4)
