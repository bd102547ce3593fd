"""Figures of semi-supervised training for the log: of each batch as tensors, of an interval as plain numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from semivim.loss.class_prior import histogram_entropy, prior_divergence
from semivim.task.pseudo_label_rule import SUMS
from semivim.task.semi_supervised import SemiSupervisedTask
from semivim.utils.lyap_ema import LyapEmaV3

LOSSES = ("loss_labelled", "loss_unlabelled")
PSEUDO_MEANS = ("kept_share", "pseudo_accuracy", "pseudo_entropy", "prior_kl")  # also kept_share_ and a group


def batch_figures(result: Mapping[str, Tensor], label: Tensor | None) -> dict[str, Tensor]:
    """Figures of a batch, which an interval adds up.

    Args:
        result: What :meth:`SemiSupervisedTask.forward` returned.
        label: True class of each unlabelled image, ``(mu_b,)``, -1 where unknown; None without unlabelled images.

    Returns:
        0-d the losses and the sums of the rule. For each class, ``(k,)``: the ``kept`` images by pseudo-label; and of
        the images whose class is known, all by true class (``known``), the kept ones by true class (``known_kept``) and
        by pseudo-label (``known_pseudo``), and those whose pseudo-label is ``right``. A kept image counts with its
        weight. On the device of the result.
    """
    figures = {name: result[name] for name in (*LOSSES, *SUMS) if name in result}
    if "keep" in result and label is not None:
        num_classes = result["output"].shape[-1]
        keep, pseudo = result["keep"].float(), result["pseudo"]
        known = (label >= 0).float()
        true = label.clamp(min=0)

        def by_class(index: Tensor, weight: Tensor) -> Tensor:
            return weight.new_zeros(num_classes).index_add_(0, index, weight)

        figures["kept"] = by_class(pseudo, keep)
        figures["known"] = by_class(true, known)
        figures["known_kept"] = by_class(true, known * keep)
        figures["known_pseudo"] = by_class(pseudo, known * keep)
        figures["right"] = by_class(true, known * keep * (pseudo == label))
    return figures


def interval_means(
    sums: Mapping[str, Tensor],
    groups: Mapping[str, Sequence[int]] | None = None,
    labelled_prior: Tensor | None = None,
) -> dict[str, float]:
    """Means of an interval, and the number of its skipped steps.

    Args:
        sums: Sums of :func:`batch_figures`, with ``batches`` and ``skipped`` of ``optimizer_step``.
        groups: Classes of each group, whose kept shares are told apart (see ``shot_groups``).
        labelled_prior: Shares of the classes among the labels, ``(k,)``.

    Returns:
        The mean losses; ``kept_share``, and of each group, by true class; ``pseudo_accuracy`` of the kept images;
        ``pseudo_entropy`` of the kept pseudo-labels' histogram, in nats; ``prior_kl``, the divergence of the mean
        prediction on weak views from the labelled prior, in nats.
    """
    total = {key: value.cpu() for key, value in sums.items()}
    means = {name: (total[name] / total["batches"]).item() for name in LOSSES if name in total}
    if "kept" in total:
        means["kept_share"] = (total["kept"].sum() / total["unlabelled"]).item()
        for name, classes in (groups or {}).items():
            if known := total["known"][classes].sum().item():
                means[f"kept_share_{name}"] = total["known_kept"][classes].sum().item() / known
        if kept := total["known_kept"].sum().item():
            means["pseudo_accuracy"] = total["right"].sum().item() / kept
        means["pseudo_entropy"] = histogram_entropy(total["kept"]).item()
    if "prob_sum" in total and labelled_prior is not None:
        means["prior_kl"] = prior_divergence(total["prob_sum"] / total["unlabelled"], labelled_prior.cpu()).item()
    if "skipped" in total:
        means["skipped"] = total["skipped"].item()
    return means


def pseudo_label_summary(sums: Mapping[str, Tensor], class_names: Sequence[str] | None) -> dict[str, Any]:
    """What became of the unlabelled images, {} without any.

    Args:
        sums: Sums of :func:`batch_figures`.
        class_names: Names of the classes, if they have any.

    Returns:
        Numbers of images ``seen`` and ``kept``, with weights their sum rounded down, and as ``fault`` a sentence where
        they cannot have taught anything: none was kept, or at least half were and all of them with one pseudo-label.
        None otherwise.
    """
    if "kept" not in sums:
        return {}
    seen, kept = int(sums["unlabelled"].item()), int(sums["kept"].sum().item())
    most, largest = (int(value.item()) for value in sums["kept"].max(dim=0))
    fault = None
    if kept == 0:
        fault = "no unlabelled image was kept, as no confidence exceeded --threshold: they taught nothing"
    elif most == kept and 2 * kept >= seen and len(sums["kept"]) > 1:
        name = _class_name(largest, class_names)
        fault = f"every unlabelled image that was kept has the pseudo-label {name!r}: they taught that class only"
    return {"seen": seen, "kept": kept, "fault": fault}


def _class_name(label: int, class_names: Sequence[str] | None) -> str:
    """Name of a class; --num-classes may be more than there are names."""
    return class_names[label] if class_names and label < len(class_names) else f"class {label}"


def pseudo_label_figures(sums: Mapping[str, Tensor], means: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Recall and precision of the pseudo-labels of each class, in percent; {} without unlabelled images.

    Args:
        sums: Sums of :func:`batch_figures`.
        means: What :func:`interval_means` made of them.

    Returns:
        ``recall``: of the images of a class, those that were kept with the right pseudo-label. ``precision``: of the
        images kept with this pseudo-label, those of that class. None where there is no such image of known class.
        ``means``, if given: those that are about pseudo-labels.
    """
    if "right" not in sums:
        return {}
    total = {name: sums[name].tolist() for name in ("right", "known", "known_pseudo")}

    def share(whole: str) -> list[float | None]:
        pairs = zip(total["right"], total[whole], strict=True)
        return [100.0 * right / all_ if all_ else None for right, all_ in pairs]

    figures: dict[str, Any] = {"recall": share("known"), "precision": share("known_pseudo")}
    if means is not None:
        figures["means"] = {name: value for name, value in means.items() if name.startswith(PSEUDO_MEANS)}
    return figures


def prior_classes(prior: Tensor | None, class_names: Sequence[str] | None) -> dict[str, str]:
    """Names of the classes of the least and largest share in the running prior of pseudo-labels; {} without one."""
    if prior is None:
        return {}
    ends = {"prior_min_class": prior.argmin(), "prior_max_class": prior.argmax()}
    return {key: _class_name(int(label), class_names) for key, label in ends.items()}


def task_figures(task: SemiSupervisedTask) -> dict[str, float]:
    """What the teacher's last update did, and the least and largest share in the running prior of pseudo-labels.

    {} before the first update, and without such a prior.
    """
    figures: dict[str, float] = {}
    if (prior := task.rule.state.get("prior")) is not None:
        figures |= {"prior_min": prior.min().item(), "prior_max": prior.max().item()}
    if task.alpha is None:
        return figures
    figures["alpha"] = task.alpha
    stats, average = task.lyap_stats, task.trainable_module_ema
    if stats is not None and isinstance(average, LyapEmaV3):
        figures.update(v=stats.v, distance=stats.distance / max(stats.teacher_norm, 1e-12))
        figures.update(guard_rate=average.guard_rate, lr_scale=stats.lr_scale)
    return figures
