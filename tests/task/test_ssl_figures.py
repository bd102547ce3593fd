import pytest
import torch
from torch import nn

from semivim.task.semi_supervised import SemiSupervisedTask
from semivim.task.ssl_figures import batch_figures, interval_means, pseudo_label_summary, teacher_figures


def make(method):
    torch.manual_seed(0)
    task = SemiSupervisedTask(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), 3, method=method, threshold=0.0)
    task.setup_ema()
    return task.train()


def result(task):
    images = torch.randn(3, 6, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    return task(images[0], torch.tensor([0, 1, 2, 0, 1, 2]), images[1], images[2])


def test_unknown_labels_do_not_count_as_wrong():
    result = {
        "loss_labelled": torch.tensor(1.0),
        "keep": torch.tensor([True, True, False, True]),
        "pseudo": torch.tensor([1, 2, 0, 0]),
        "output": torch.zeros(2, 3),
    }
    figures = batch_figures(result, torch.tensor([1, 0, 0, -1]))
    assert figures.pop("kept_classes").tolist() == [1, 1, 1]
    assert {k: v.item() for k, v in figures.items()} == {
        "loss_labelled": 1, "unlabelled": 4, "kept": 3, "known": 2, "right": 1,
    }  # fmt: skip


def test_means_of_an_interval():
    task = make("lyapema")
    figures = batch_figures(result(task), torch.tensor([0, 1, 2, -1, 0, 1]))
    sums = {name: 2 * value for name, value in figures.items()}
    means = interval_means(sums | {"batches": torch.tensor(2.0), "skipped": torch.tensor(1.0)})
    assert list(means) == ["loss_labelled", "loss_unlabelled", "kept_share", "pseudo_accuracy", "skipped"]
    assert means["loss_labelled"] == figures["loss_labelled"].item()
    assert (means["kept_share"], means["skipped"]) == (1.0, 1.0)
    assert means["pseudo_accuracy"] == figures["right"].item() / 5


def test_interval_without_known_classes_or_without_unlabelled_images_has_no_such_mean():
    task = make("fixmatch")
    sums = batch_figures(result(task), torch.full((6,), -1)) | {"batches": torch.tensor(1.0)}
    assert "pseudo_accuracy" not in interval_means(sums)
    supervised = batch_figures(make("supervised")(torch.zeros(1, 1, 2, 2), torch.tensor([0])), None)
    assert list(interval_means(supervised | {"batches": torch.tensor(1.0)})) == ["loss_labelled"]
    assert interval_means({}) == {}


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
    result = {"keep": torch.tensor(keep, dtype=torch.bool), "pseudo": torch.tensor(pseudo), "output": torch.zeros(1, 3)}
    figures = batch_figures(result, torch.full((4,), -1))
    summary = pseudo_label_summary({name: 3 * value for name, value in figures.items()}, ["ant", "bee", "elk"])
    assert (summary["seen"], summary["kept"]) == (12, 3 * sum(keep))
    assert fault in summary["fault"] if fault else summary["fault"] is None
    assert "class 2" in (pseudo_label_summary(figures, None)["fault"] or "class 2") or not sum(keep)
    assert pseudo_label_summary({}, None) == {}


def test_teacher_figures_are_those_of_its_last_update():
    task = make("lyapema")
    assert teacher_figures(task) == {}
    with torch.no_grad():
        task.trainable_module[1].weight.add_(0.1)
    task.update_ema(1)
    assert set(teacher_figures(task)) == {"alpha", "v", "distance", "guard_rate", "lr_scale"}
    plain = make("ema-teacher")
    plain.update_ema(1)
    assert set(teacher_figures(plain)) == {"alpha"}
