from contextlib import nullcontext

import pytest
import torch

from semivim.utils.metrics import ClassificationMetrics, describe_groups, evaluate, shot_groups

CPU = torch.device("cpu")


def logits_of(classes, num_classes):
    return torch.nn.functional.one_hot(torch.tensor(classes), num_classes).float()


def test_metrics_by_hand():
    metrics = ClassificationMetrics(3, CPU)
    metrics.update(logits_of([0, 0, 1], 3), torch.tensor([0, 0, 0]))
    metrics.update(logits_of([1, 2, 2], 3), torch.tensor([1, 1, 2]))
    result = metrics.compute([10, 5, 1])
    assert result["top1"] == pytest.approx(100 * 4 / 6)
    assert result["per_class_recall"] == pytest.approx([200 / 3, 50.0, 100.0])
    assert result["balanced_acc"] == pytest.approx((200 / 3 + 50 + 100) / 3)
    assert result["worst_class_recall"] == 50.0
    assert (result["many"], result["medium"], result["few"]) == pytest.approx((200 / 3, 50.0, 100.0))
    assert result["confusion"] == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]
    assert result["top5"] == 100.0


def test_class_without_images_counts_nowhere():
    metrics = ClassificationMetrics(3, CPU)
    metrics.update(logits_of([0, 1], 3), torch.tensor([0, 0]))
    result = metrics.compute()
    assert result["per_class_recall"] == [50.0, None, None]
    assert result["balanced_acc"] == result["worst_class_recall"] == 50.0
    assert "many" not in result


def test_top5_is_not_top1():
    metrics = ClassificationMetrics(10, CPU)
    metrics.update(torch.arange(10.0).expand(2, 10), torch.tensor([5, 4]))
    result = metrics.compute()
    assert (result["top1"], result["top5"]) == (0.0, 50.0)


def test_groups_are_imagenet_lt_bounds_or_thirds():
    assert shot_groups([4] * 10) == {}
    assert shot_groups([127, 133, 129]) == {}
    assert shot_groups([]) == {}
    assert shot_groups([1, 9, 5]) == {"many": [1], "medium": [2], "few": [0]}
    said = "many 9 to 9 (2 classes), medium 5 to 5 (1 classes), few 1 to 1 (1 classes)"
    assert describe_groups([1, 9, 5, 9]) == f"groups of classes by training images: {said}"
    assert describe_groups([4] * 10) == ""
    groups = shot_groups([101] * 40 + [100] * 30 + [20] * 10 + [19] * 20)
    assert [len(groups[name]) for name in ("many", "medium", "few")] == [40, 40, 20]


def test_evaluate_uses_eval_mode_and_every_batch():
    class Model(torch.nn.Module):
        def forward(self, x):
            assert not self.training
            return logits_of([int(i) for i in x.flatten()], 3)

    loader = [(torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1])), (torch.tensor([[2.0]]), torch.tensor([1]))]
    result = evaluate(Model().train(), loader, 3, CPU, nullcontext, [1, 1, 1])
    assert result["confusion"] == [[1, 0, 0], [0, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize("counts", [[9, 5, 5, 5, 1, 1], [9, 9, 9, 9, 9, 1], [9, 1, 1, 1, 1, 1], [5, 5, 3, 2, 2, 2, 2]])
def test_classes_of_equal_counts_are_in_one_group(counts):
    """The alphabet must not decide which of them is rare."""
    groups = shot_groups(counts)
    assert sorted(c for classes in groups.values() for c in classes) == list(range(len(counts)))
    for count in set(counts):
        members = {c for c, own in enumerate(counts) if own == count}
        assert sum(bool(members & set(classes)) for classes in groups.values()) == 1
    sizes = [[counts[c] for c in groups[name]] for name in ("many", "medium", "few")]
    assert sum(sizes, []) == sorted(counts, reverse=True)
