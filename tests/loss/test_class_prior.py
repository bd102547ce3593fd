import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from semivim.loss.class_prior import (
    adjust_logits,
    histogram_entropy,
    labelled_prior,
    prior_divergence,
    update_prior,
)


def random_prior(k, seed):
    return torch.randn(k, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def test_labelled_prior_is_the_share_of_labels_and_an_empty_class_counts_as_one():
    prior = labelled_prior([6, 3, 0])
    assert prior.dtype == torch.float32
    torch.testing.assert_close(prior, torch.tensor([0.6, 0.3, 0.1]))
    for counts in ([], [3, -1]):
        with pytest.raises(ValueError, match="counts must be"):
            labelled_prior(counts)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_adjusted_loss_of_shifted_logits_is_the_plain_loss(tau):
    torch.manual_seed(0)
    logits, label, prior = torch.randn(32, 5), torch.randint(5, (32,)), labelled_prior([50, 20, 5, 2, 1])
    shifted = logits - tau * prior.log()
    adjusted = F.cross_entropy(adjust_logits(shifted, prior, tau), label)
    assert adjusted.item() == pytest.approx(F.cross_entropy(logits, label).item(), rel=1e-6)
    # the shifted model predicts what plain adjustment after training predicts
    assert torch.equal(shifted.argmax(-1), adjust_logits(logits, prior, -tau).argmax(-1))
    assert not torch.equal(shifted.argmax(-1), logits.argmax(-1))


def test_uniform_prior_changes_neither_loss_nor_gradient():
    torch.manual_seed(0)
    label = torch.randint(4, (16,))
    results = []
    for tau in (0.0, 1.0, 3.0):
        logits = torch.randn(16, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
        loss = F.cross_entropy(adjust_logits(logits, torch.full((4,), 0.25), tau), label)
        loss.backward()
        results.append((loss.detach(), logits.grad))
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-5, atol=1e-7)


def test_adjustment_of_half_precision_logits_is_float32():
    logits = torch.randn(2, 3).bfloat16()
    assert torch.equal(adjust_logits(logits, torch.full((3,), 1 / 3), 0.0), logits.float())


@given(st.integers(2, 12), st.floats(0, 0.999), st.integers(0, 2**31), st.integers(1, 60))
def test_running_prior_stays_positive_with_sum_one_and_permutes_with_the_classes(k, momentum, seed, steps):
    prior, mirrored = random_prior(k, seed), random_prior(k, seed).flip(0)
    for step in range(steps):
        mean = F.one_hot(torch.tensor(step % 2), k).float() if seed % 2 else random_prior(k, seed + step)
        prior, mirrored = update_prior(prior, mean, momentum), update_prior(mirrored, mean.flip(0), momentum)
    assert (prior > 0).all()
    assert prior.sum().item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(prior.flip(0), mirrored)
    assert prior.log().isfinite().all()


def test_constant_input_is_approached_at_the_rate_of_the_momentum():
    start, mean = random_prior(4, 0), random_prior(4, 1)
    prior = start
    for _ in range(20):
        prior = update_prior(prior, mean, 0.9)
    torch.testing.assert_close(prior - mean, (start - mean) * 0.9**20, rtol=1e-4, atol=1e-7)


def test_divergence_and_entropy_by_hand():
    prior = torch.tensor([0.75, 0.25, 0.0])
    reference = torch.tensor([0.5, 0.25, 0.25])
    assert prior_divergence(prior, reference).item() == pytest.approx(0.75 * math.log(1.5))
    assert prior_divergence(reference, reference).item() == 0
    assert histogram_entropy(torch.tensor([2.0, 2.0, 2.0])).item() == pytest.approx(math.log(3))
    assert histogram_entropy(torch.tensor([5.0, 0.0])).item() == 0
    assert histogram_entropy(torch.zeros(3)).item() == 0
