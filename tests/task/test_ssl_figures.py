import math

import pytest
import torch
from torch import nn

from semivim.task.pseudo_label_rule import PseudoLabelRule
from semivim.task.semi_supervised import SemiSupervisedTask
from semivim.task.ssl_figures import (
    batch_figures,
    interval_means,
    prior_classes,
    pseudo_label_figures,
    pseudo_label_summary,
    task_figures,
)


def make(method, **rule):
    torch.manual_seed(0)
    rule = PseudoLabelRule(3, [4, 2, 1], threshold=0.0, **rule)
    task = SemiSupervisedTask(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), 3, method=method, rule=rule)
    task.setup_ema()
    return task.train()


def result(task):
    images = torch.randn(3, 6, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    return task(images[0], torch.tensor([0, 1, 2, 0, 1, 2]), images[1], images[2])


def test_images_are_counted_by_true_class_and_by_pseudo_label_and_unknown_ones_are_not_wrong():
    result = {
        "loss_labelled": torch.tensor(1.0),
        "output": torch.zeros(2, 3),
        "unlabelled": torch.tensor(5.0),
        "keep": torch.tensor([True, True, False, True, True]),
        "pseudo": torch.tensor([1, 2, 0, 0, 1]),
    }
    figures = batch_figures(result, torch.tensor([1, 0, 0, -1, 1]))
    assert {k: v.tolist() for k, v in figures.items()} == {
        "loss_labelled": 1,
        "unlabelled": 5,
        "kept": [1, 2, 1],
        "known": [2, 2, 0],
        "known_kept": [1, 2, 0],
        "known_pseudo": [0, 2, 1],
        "right": [0, 2, 0],
    }
    assert pseudo_label_figures(figures) == {"recall": [0, 100, None], "precision": [None, 100, 0]}
    means = interval_means(figures | {"batches": torch.tensor(1.0)}, {"many": [0], "few": [1, 2]})
    assert (means["kept_share"], means["pseudo_accuracy"]) == (pytest.approx(0.8), pytest.approx(2 / 3))
    assert (means["kept_share_many"], means["kept_share_few"]) == (0.5, 1.0)
    assert means["pseudo_entropy"] == pytest.approx(-2 * 0.25 * math.log(0.25) - 0.5 * math.log(0.5))


def test_kept_images_count_with_their_weight():
    result = {
        "output": torch.zeros(2, 2),
        "unlabelled": torch.tensor(2.0),
        "keep": torch.tensor([0.25, 0.75]),
        "pseudo": torch.tensor([1, 1]),
    }
    figures = batch_figures(result, torch.tensor([1, 0]))
    assert interval_means(figures | {"batches": torch.tensor(1.0)})["kept_share"] == 0.5
    assert pseudo_label_figures(figures) == {"recall": [0, 25], "precision": [None, 25]}


def test_means_of_an_interval():
    task = make("lyapema")
    figures = batch_figures(result(task), torch.tensor([0, 1, 2, -1, 0, 1]))
    sums = {name: 2 * value for name, value in figures.items()}
    prior = torch.tensor([0.5, 0.25, 0.25])
    means = interval_means(sums | {"batches": torch.tensor(2.0), "skipped": torch.tensor(1.0)}, {}, prior)
    assert list(means) == [
        *("loss_labelled", "loss_unlabelled", "kept_share", "pseudo_accuracy", "pseudo_entropy", "prior_kl", "skipped")
    ]
    assert means["loss_labelled"] == figures["loss_labelled"].item()
    assert (means["kept_share"], means["skipped"]) == (1.0, 1.0)
    assert means["pseudo_accuracy"] == figures["right"].sum().item() / 5
    mean = figures["prob_sum"] / 6
    assert means["prior_kl"] == pytest.approx((mean * (mean / prior).log()).sum().item(), abs=1e-6)


def test_interval_without_known_classes_or_without_unlabelled_images_has_no_such_mean():
    task = make("fixmatch")
    sums = batch_figures(result(task), torch.full((6,), -1)) | {"batches": torch.tensor(1.0)}
    assert "pseudo_accuracy" not in interval_means(sums)
    supervised = batch_figures(make("supervised")(torch.zeros(1, 1, 2, 2), torch.tensor([0])), None)
    assert list(interval_means(supervised | {"batches": torch.tensor(1.0)})) == ["loss_labelled"]
    assert interval_means({}) == {}
    assert pseudo_label_figures(supervised) == {}


@pytest.mark.parametrize(
    ("keep", "pseudo", "fault"),
    [
        ([0, 0, 0, 0], [1, 1, 1, 1], "no unlabelled image was kept, as no confidence exceeded --threshold"),
        ([1, 1, 1, 1], [2, 2, 2, 2], "every unlabelled image that was kept has the pseudo-label 'elk'"),
        ([1, 1, 0, 0], [2, 2, 1, 1], "has the pseudo-label 'elk'"),
        ([1, 0, 0, 0], [2, 1, 1, 1], None),  # few are kept: it is early
        ([1, 1, 1, 1], [2, 2, 2, 1], None),
    ],
)
def test_unlabelled_images_that_taught_nothing_are_told(keep, pseudo, fault):
    keep = torch.tensor(keep, dtype=torch.bool)
    result = {
        "keep": keep,
        "pseudo": torch.tensor(pseudo),
        "output": torch.zeros(1, 3),
        "unlabelled": torch.tensor(4.0),
    }
    figures = batch_figures(result, torch.full((4,), -1))
    summary = pseudo_label_summary({name: 3 * value for name, value in figures.items()}, ["ant", "bee", "elk"])
    assert (summary["seen"], summary["kept"]) == (12, 3 * sum(keep))
    assert fault in summary["fault"] if fault else summary["fault"] is None
    assert "class 2" in (pseudo_label_summary(figures, None)["fault"] or "class 2") or not sum(keep)
    assert pseudo_label_summary({}, None) == {}


def test_task_figures_are_those_of_its_last_update():
    task = make("lyapema")
    assert task_figures(task) == {}
    with torch.no_grad():
        task.trainable_module[1].weight.add_(0.1)
    task.update_ema(1)
    assert set(task_figures(task)) == {"alpha", "v", "distance", "guard_rate", "lr_scale"}
    plain = make("ema-teacher")
    plain.update_ema(1)
    assert set(task_figures(plain)) == {"alpha"}
    debiased = make("ema-teacher", debias=1.0)
    assert task_figures(debiased) == {"prior_min": pytest.approx(1 / 3), "prior_max": pytest.approx(1 / 3)}


def test_classes_of_the_least_and_largest_share_of_the_prior_are_named():
    prior = torch.tensor([0.3, 0.6, 0.1])
    assert prior_classes(prior, ["ant", "bee"]) == {"prior_min_class": "class 2", "prior_max_class": "bee"}
    assert prior_classes(prior, None) == {"prior_min_class": "class 2", "prior_max_class": "class 1"}
    assert prior_classes(None, ["ant", "bee"]) == {}
