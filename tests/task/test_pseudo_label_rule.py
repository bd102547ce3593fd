"""The rule of pseudo-labels: corrections by a prior, thresholds, and running means that every rank shares."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from semivim.loss.pseudo_label import confidence_and_pseudo, keep_mask, unlabelled_loss
from semivim.task.pseudo_label_rule import SUMS, PseudoLabelRule

K = 4
COUNTS = [40, 10, 4, 1]


def logits(rows=12, seed=0):
    return 2 * torch.randn(rows, K, generator=torch.Generator().manual_seed(seed))


def moved(rule, steps=5):
    for step in range(steps):
        rule.commit(rule(logits(seed=step) + torch.tensor([2.0, 0.5, 0.0, -1.0])).sums)
    return rule


def test_plain_rule_is_softmax_argmax_and_a_fixed_threshold_to_the_bit():
    rule = PseudoLabelRule(K, threshold=0.6)
    labels = rule(logits())
    confidence, pseudo = confidence_and_pseudo(logits())
    assert torch.equal(labels.confidence, confidence)
    assert torch.equal(labels.pseudo, pseudo)
    assert labels.target is labels.pseudo
    assert torch.equal(labels.keep, keep_mask(confidence, 0.6))
    assert rule.state == {}
    assert rule.labelled_logits(logits()).equal(logits())
    assert rule.unlabelled_logits(logits()).equal(logits())


def test_uniform_running_mean_is_the_plain_rule():
    plain, debiased = PseudoLabelRule(K)(logits()), PseudoLabelRule(K, debias=1.0)(logits())
    torch.testing.assert_close(debiased.confidence, plain.confidence)
    assert torch.equal(debiased.pseudo, plain.pseudo)
    assert torch.equal(debiased.keep, plain.keep)
    rule = PseudoLabelRule(K, debias=1.0)
    losses = [F.cross_entropy(f(logits()), plain.pseudo).item() for f in (rule.unlabelled_logits, lambda x: x)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_debiasing_follows_its_equations_written_out():
    rule = moved(PseudoLabelRule(K, debias=0.7, momentum=0.5, threshold=0.5))
    p = rule.state["prior"]
    assert p.argmax() == 0 and p.max() > 2 * p.min()
    labels = rule(logits(rows=200, seed=9))
    q = (logits(rows=200, seed=9) - 0.7 * p.log()).softmax(-1)
    torch.testing.assert_close(labels.confidence, q.max(-1).values)
    assert torch.equal(labels.pseudo, q.argmax(-1))
    assert torch.equal(labels.keep, q.max(-1).values > 0.5)
    assert not torch.equal(labels.pseudo, logits(rows=200, seed=9).argmax(-1))
    torch.testing.assert_close(rule.unlabelled_logits(logits()), logits() + 0.7 * p.log())
    # the mean is that of the probabilities before correction
    rule.commit(labels.sums)
    torch.testing.assert_close(rule.state["prior"], 0.5 * p + 0.5 * logits(rows=200, seed=9).softmax(-1).mean(0))


def test_teacher_that_says_nothing_but_its_bias_labels_nothing():
    rule = moved(PseudoLabelRule(K, debias=1.0, momentum=0.5, threshold=0.26))
    labels = rule(rule.state["prior"].log().expand(6, K))
    torch.testing.assert_close(labels.confidence, torch.full((6,), 1 / K))
    assert not labels.keep.any()


def test_margin_pushes_a_rare_target_more_than_a_frequent_one():
    rule = moved(PseudoLabelRule(K, debias=1.0, momentum=0.5))
    p, pushes = rule.state["prior"], []
    for target in (int(p.argmax()), int(p.argmin())):
        student = torch.zeros(1, K, requires_grad=True)
        unlabelled_loss(rule.unlabelled_logits(student), torch.tensor([target]), torch.tensor([True])).backward()
        pushes.append(-student.grad[0, target].item())
    assert pushes[1] > 1.5 * pushes[0] > 0


@pytest.mark.parametrize("pseudo_prior", ["labeled", "estimated"])
def test_logit_adjustment_follows_its_equations_written_out(pseudo_prior):
    rule = PseudoLabelRule(K, COUNTS, tau=0.8, pseudo_prior=pseudo_prior, soft=True, momentum=0.5)
    pi_l = torch.tensor(COUNTS) / sum(COUNTS)
    torch.testing.assert_close(rule.prior, pi_l)
    labels = rule(logits())
    q = (logits() + 0.8 * pi_l.log()).softmax(-1)
    torch.testing.assert_close(labels.target, q)
    assert torch.equal(labels.keep, q.max(-1).values > 0.7)
    torch.testing.assert_close(rule.labelled_logits(logits()), logits() + 0.8 * pi_l.log())
    rule.commit(labels.sums)
    wanted = 0.5 * pi_l + 0.5 * q.mean(0) if pseudo_prior == "estimated" else pi_l
    torch.testing.assert_close(rule.prior, wanted)
    torch.testing.assert_close(rule.unlabelled_logits(logits()), logits() + 0.8 * wanted.log())
    torch.testing.assert_close(rule.labelled_logits(logits()), logits() + 0.8 * pi_l.log())


def test_freematch_follows_its_equations_written_out():
    rule = PseudoLabelRule(K, threshold_mode="freematch", momentum=0.5)
    assert rule.state["threshold"].item() == 1 / K
    labels = rule(logits())
    assert torch.equal(labels.keep, labels.confidence > 1 / K)
    rule.commit(labels.sums)
    probs = logits().softmax(-1)
    threshold, share = 0.5 / K + 0.5 * probs.max(-1).values.mean(), 0.5 / K + 0.5 * probs.mean(0)
    torch.testing.assert_close(rule.state["threshold"], threshold)
    torch.testing.assert_close(rule.state["class_probs"], share)
    later = rule(logits(rows=200, seed=1))
    assert torch.equal(later.keep, later.confidence > threshold * share[later.pseudo] / share.max())
    assert 0 < later.keep.sum() < 200


def test_softmatch_follows_its_equations_written_out():
    rule = PseudoLabelRule(K, threshold_mode="softmatch", momentum=0.5)
    labels = rule(logits())
    assert labels.keep.min() > 0.9  # the variance starts at 1
    rule.commit(labels.sums)
    confidence = logits().softmax(-1).max(-1).values
    mean, var = 0.5 / K + 0.5 * confidence.mean(), 0.5 + 0.5 * confidence.var()
    torch.testing.assert_close(rule.state["confidence_mean"], mean)
    torch.testing.assert_close(rule.state["confidence_var"], var)
    later = rule(logits(seed=1))
    below = (later.confidence - mean).clamp(max=0)
    torch.testing.assert_close(later.keep, torch.exp(-(below**2) / (2 * var / 4)))


ALL = [
    {"debias": 1.0},
    {"tau": 1.0, "pseudo_prior": "estimated"},
    {"threshold_mode": "freematch"},
    {"threshold_mode": "softmatch"},
    {"debias": 1.0, "threshold_mode": "freematch"},
]


@pytest.mark.parametrize("options", ALL)
def test_batches_of_one_step_move_the_means_as_the_whole_batch_does(options):
    whole, parts = (PseudoLabelRule(K, COUNTS, momentum=0.5, **options) for _ in range(2))
    whole.commit(whole(logits()).sums)
    first, second = parts(logits()[:3]).sums, parts(logits()[3:]).sums
    parts.commit({name: first[name] + second[name] for name in first})
    for name, value in whole.state.items():
        torch.testing.assert_close(parts.state[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", ALL)
def test_state_comes_back_and_that_of_another_rule_is_refused(options):
    rule = moved(PseudoLabelRule(K, COUNTS, momentum=0.9, **options))
    other = PseudoLabelRule(K, COUNTS, momentum=0.9, **options)
    other.load_state(rule.state)
    for each in (rule, other):
        moved(each)
    assert all(torch.equal(rule.state[name], other.state[name]) for name in rule.state)
    with pytest.raises(ValueError, match="got nothing, wanted .*--debias-pseudo"):
        other.load_state({})


@pytest.mark.parametrize("options", ALL)
def test_infinite_logits_leave_the_means(options):
    rule = moved(PseudoLabelRule(K, COUNTS, momentum=0.9, **options))
    before = dict(rule.state)
    rule.commit(rule(torch.full((2, K), float("inf"))).sums)
    assert all(torch.equal(rule.state[name], before[name]) for name in before)


def commit_halves(options, ranks):
    """Three steps of a rule that sees only the first 3, or the last 9, of 12 images a step."""
    states = []
    for rank in ranks:
        rule = PseudoLabelRule(K, COUNTS, momentum=0.5, **options)
        for step in range(3):
            rows = logits(seed=step)
            sums = rule(rows[:3] if rank == 0 else rows[3:]).sums
            given = {name: value.clone() for name, value in sums.items()}
            rule.commit(sums)
            assert all(torch.equal(sums[name], given[name]) for name in given), "the log's sums have changed"
        states.append(rule.state)
    return states


def check_ranks(options, first, second):
    alone = PseudoLabelRule(K, COUNTS, momentum=0.5, **options)
    for step in range(3):
        alone.commit(alone(logits(seed=step)).sums)
    for name, value in alone.state.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", ALL)
def test_ranks_hold_the_means_of_all_their_images(options, monkeypatch):
    """Two ranks as two threads, whose sums meet in a stand-in for all_reduce."""
    values, meet = {}, threading.Barrier(2, timeout=30)

    def all_reduce(value):
        values[threading.get_ident()] = value.clone()
        meet.wait()
        total = sum(values[key] for key in sorted(values))
        meet.wait()
        value.copy_(total)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    with ThreadPoolExecutor(2) as pool:
        (first,), (second,) = pool.map(lambda rank: commit_halves(options, [rank]), range(2))
    monkeypatch.undo()
    check_ranks(options, first, second)


def _gloo_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save([commit_halves(options, [rank])[0] for options in ALL], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_hold_the_means_of_all_their_images(tmp_path):
    torch.multiprocessing.spawn(_gloo_rank, (str(tmp_path),), nprocs=2)
    for options, *states in zip(
        ALL, *(torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)), strict=True
    ):
        check_ranks(options, *states)


def test_sums_are_those_that_a_step_passes_on():
    rule = PseudoLabelRule(K, COUNTS, tau=1.0, pseudo_prior="estimated", threshold_mode="softmatch")
    assert set(rule(logits()).sums) == set(SUMS)
    assert not any(value.requires_grad for value in rule(logits().requires_grad_()).sums.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pseudo_prior": "uniform"}, "pseudo_prior 'uniform' is not one of"),
        ({"threshold_mode": "flex"}, "threshold_mode 'flex' is not one of"),
        ({"threshold": 1.0}, r"threshold is 1.0, wanted a confidence in \[0, 1\)"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"debias": -1.0}, "debias is -1.0"),
        ({"debias": 1.0, "tau": 1.0, "pseudo_prior": "labeled"}, "would correct twice"),
        ({"pseudo_prior": "labeled"}, "needs tau above 0, got 0.0"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PseudoLabelRule(K, COUNTS, **options)


def test_adjustment_needs_the_labels_counts_and_an_empty_class_is_finite():
    with pytest.raises(ValueError, match="tau 1.0 needs class_counts"):
        PseudoLabelRule(K, tau=1.0)
    rule = PseudoLabelRule(2, [9, 0], tau=1.0)
    assert rule.labelled_logits(torch.zeros(1, 2)).tolist() == [pytest.approx([math.log(0.9), math.log(0.1)])]
