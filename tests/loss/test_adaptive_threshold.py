import math

import pytest
import torch

from semivim.loss.adaptive_threshold import freematch_threshold, softmatch_weight


def test_freematch_lowers_the_threshold_of_classes_predicted_less():
    threshold = freematch_threshold(torch.tensor([0, 1, 2]), torch.tensor(0.8), torch.tensor([0.6, 0.3, 0.1]))
    torch.testing.assert_close(threshold, torch.tensor([0.8, 0.4, 0.8 / 6]))


def test_softmatch_weighs_by_a_truncated_gaussian():
    weight = softmatch_weight(torch.tensor([0.9, 0.7, 0.5]), torch.tensor(0.7), torch.tensor(0.04))
    # sigma = 0.2 / num_sigma = 0.1, so 0.5 lies two sigma below the mean
    assert weight.tolist() == pytest.approx([1.0, 1.0, math.exp(-2.0)])
    wide = softmatch_weight(torch.tensor([0.5]), torch.tensor(0.7), torch.tensor(0.04), num_sigma=1.0)
    assert wide.item() == pytest.approx(math.exp(-0.5))


def test_softmatch_without_variance_is_a_step():
    weight = softmatch_weight(torch.tensor([0.7, 0.6]), torch.tensor(0.7), torch.tensor(0.0))
    assert weight.tolist() == [1.0, 0.0]
