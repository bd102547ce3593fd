import math

import pytest
import torch

from semivim.loss.pseudo_label import confidence_and_pseudo, keep_mask, labelled_loss, unlabelled_loss


def test_confidence_is_the_softmax_maximum_in_float32():
    logits = torch.tensor([[0.0, math.log(3.0)], [2.0, 2.0]], dtype=torch.bfloat16, requires_grad=True)
    confidence, pseudo = confidence_and_pseudo(logits)
    assert confidence.dtype == torch.float32
    assert confidence[0].item() == pytest.approx(0.75, abs=2e-3)
    assert confidence[1].item() == 0.5
    assert pseudo[0].item() == 1
    assert not confidence.requires_grad


def test_threshold_is_strict():
    assert keep_mask(torch.tensor([0.7, 0.71, 0.2]), 0.7).tolist() == [False, True, False]


def test_unlabelled_loss_divides_by_the_whole_batch():
    logits = torch.zeros(4, 3)
    target = torch.tensor([0, 1, 2, 0])
    keep = torch.tensor([True, False, False, False])
    assert unlabelled_loss(logits, target, keep).item() == pytest.approx(math.log(3) / 4)


def test_nothing_kept_is_zero_with_zero_gradient_even_where_a_row_is_infinite():
    logits = torch.zeros(2, 3)
    logits[0, 0] = float("inf")
    logits.requires_grad_()
    loss = unlabelled_loss(logits, torch.tensor([0, 1]), torch.tensor([False, False]))
    assert loss.item() == 0.0
    logits = torch.randn(2, 3, requires_grad=True)
    unlabelled_loss(logits, torch.tensor([0, 1]), torch.tensor([False, False])).backward()
    assert torch.equal(logits.grad, torch.zeros(2, 3))


def test_soft_targets_agree_with_class_indices():
    logits, target = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    keep = torch.tensor([True, True, False, True, True])
    one_hot = torch.nn.functional.one_hot(target, 4).float()
    assert unlabelled_loss(logits, one_hot, keep).item() == pytest.approx(unlabelled_loss(logits, target, keep).item())
    assert labelled_loss(logits, one_hot, 0.1).item() == pytest.approx(labelled_loss(logits, target, 0.0).item())
    assert labelled_loss(logits, target, 0.1).item() != pytest.approx(labelled_loss(logits, target, 0.0).item())


def test_rows_count_with_their_weight():
    logits, target = torch.randn(3, 4), torch.tensor([0, 1, 2])
    weight = torch.tensor([1.0, 0.25, 0.0])
    each = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    assert unlabelled_loss(logits, target, weight).item() == pytest.approx((weight * each).sum().item() / 3)
    logits[2, 0] = float("inf")
    assert unlabelled_loss(logits, target, weight).isfinite()
