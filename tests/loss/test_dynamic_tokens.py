import math

import pytest
import torch

from semivim.loss.dynamic_tokens import distillation_loss, gate_ratio_loss, kept_token_loss, token_ratio_loss


def test_token_ratio_is_squared_per_image_and_averaged():
    kept = torch.zeros(2, 2, 10)
    kept[0, 0, :5] = 1  # 0.5, wanted 0.5
    kept[0, 1, :7] = 1  # 0.7
    kept[1, :, :3] = 1  # 0.3 twice, wanted 0.25
    assert token_ratio_loss(kept, 0.5).item() == pytest.approx((0 + 0.04 + 2 * 0.0025) / 4)
    assert token_ratio_loss(torch.zeros(0, 2, 10), 0.5).item() == 0


def test_gate_ratio_is_one_share_over_all():
    gates = torch.tensor([[[1.0, 1.0]], [[0.0, 0.0]]])  # blocks may differ without cost
    assert gate_ratio_loss(gates, 0.5).item() == 0
    assert gate_ratio_loss(gates, 0.8).item() == pytest.approx(0.09)


def test_distillation_is_the_divergence_of_the_student_from_the_teacher():
    teacher = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]], requires_grad=True)
    student = torch.zeros(2, 2, requires_grad=True)
    loss = distillation_loss(student, teacher)
    assert loss.item() == pytest.approx((0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2)
    loss.backward()
    assert teacher.grad is None and student.grad.any()


def test_only_kept_patches_are_compared_and_never_the_class_token():
    tokens, kept = torch.zeros(1, 5, 3, requires_grad=True), torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    teacher = torch.tensor([1.0, 10.0, 100.0, 3.0, 1000.0])[None, :, None].expand(1, 5, 3)
    loss = kept_token_loss(tokens, teacher, kept)
    assert loss.item() == pytest.approx((1 + 9) / 2)
    loss.backward()
    assert tokens.grad[0].any(1).tolist() == [True, False, False, True, False]
    assert kept_token_loss(tokens, teacher, torch.zeros(1, 4)).item() == 0
