"""Remove a class prior from a trained model's head: logit adjustment after training, without a cost at inference.

What was removed is noted in the model as ``logit_adjustment`` and stored with it in config.json.
"""

import copy
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.models import load_state_dict
from torch import Tensor, nn

from semivim.loss.class_prior import LEAST_SHARE
from semivim.runs.checkpoint import ADJUSTMENT
from semivim.runs.run_folder import CONFIG, LAST
from semivim.utils.files import load_untrusted, read_mapping
from semivim.utils.process_group import in_process_group
from semivim.utils.user_error import UserError, short

_logger = logging.getLogger(__name__)

POSTHOC_PRIORS = ("none", "labeled", "unlabeled")


@torch.no_grad()
def mean_prediction(
    model: nn.Module, images: Iterable[Tensor], autocast: Callable[[], AbstractContextManager]
) -> Tensor:
    """Mean class probabilities of a model, in eval mode, over the images of all ranks.

    Args:
        model: Gives logits ``(b, k)``.
        images: Batches ``(b, c, h, w)`` on the model's device, at least one on each rank.
        autocast: Gives the context of a forward pass.

    Returns:
        ``(k,)`` float32.

    Source: the mean prediction of Wang et al. (arXiv:2201.01490), used after training.
    """
    model.eval()
    parts = []
    for batch in images:
        with autocast():
            logits = model(batch)
        parts.append(torch.cat([logits.float().softmax(-1).sum(0), logits.new_tensor([len(batch)]).float()]))
    total = torch.stack(parts).sum(0)
    if in_process_group():
        dist.all_reduce(total)
    return (total[:-1] / total[-1]).clamp(min=LEAST_SHARE)


@torch.no_grad()
def shift_head(model: nn.Module, prior: Tensor, tau: float) -> None:
    """Change the head's bias in place: ``b <- b - tau log prior``; the logits become ``f - tau log prior``.

    Args:
        model: A timm model.
        prior: ``(k,)``, positive.
        tau: Strength; 1 turns the posterior under the prior into that under equal classes.

    Raises:
        UserError: If the model's head is no linear layer with a bias.

    Source: Menon et al. (arXiv:2007.07314), Eq. (9).
    """
    head = model.get_classifier()  # type: ignore[operator]
    if not isinstance(head, nn.Linear) or head.bias is None:
        kind = f"{type(head).__name__}{' without a bias' if isinstance(head, nn.Linear) else ''}"
        flags = "--posthoc-debias and --logit-adjust-tau"
        raise UserError(f"{flags} remove a prior from the bias of a linear head (nn.Linear), got {kind}")
    head.bias.sub_(tau * prior.to(head.bias).log())


def debiased_copies(
    models: Mapping[str, nn.Module],
    by: str,
    tau: float,
    labelled_prior: Tensor,
    images: Callable[[], Iterable[Tensor]],
    autocast: Callable[[], AbstractContextManager],
) -> dict[str, nn.Module]:
    """Copies of student and teacher with a prior removed from their heads (see :func:`shift_head`), for export.

    Args:
        models: timm models, ``student`` and ``teacher`` among them.
        by: Which prior: of the labels (``labeled``), each model's mean prediction on unlabelled images
            (``unlabeled``); ``none`` copies nothing.
        tau: Strength.
        labelled_prior: ``(k,)``.
        images: Gives batches of unlabelled images.
        autocast: Gives the context of a forward pass.

    Returns:
        ``student_debiased`` and ``teacher_debiased``, in eval mode, in which ``by`` and ``tau`` are noted.
    """
    copies: dict[str, nn.Module] = {}
    for name in ("student", "teacher") if by != "none" else ():
        model = models[name]
        done = getattr(model, ADJUSTMENT, None) or {}
        adjusted = copy.deepcopy(model).eval()
        prior = labelled_prior if by == "labeled" else mean_prediction(adjusted, images(), autocast)
        shift_head(adjusted, prior, tau)
        setattr(adjusted, ADJUSTMENT, {"by": by, "tau": tau, **({"loss_tau": done["tau"]} if done else {})})
        copies[f"{name}_debiased"] = adjusted
    return copies


def refuse_second_removal(checkpoint: str, by: str) -> None:
    """Refuse to remove a prior after training from a head that lost one so before: it would favour the rarest classes.

    Args:
        checkpoint: Where the model's weights came from; '' for a new model.
        by: Which prior is to be removed; ``none`` refuses nothing.

    Raises:
        UserError: If the checkpoint's head lost a prior after training.
    """
    if not checkpoint or by == "none":
        return
    done = read_adjustment(Path(checkpoint)) or {}
    if done.get("by") in POSTHOC_PRIORS:
        raise UserError(
            f"--posthoc-debias {by}: the head of --initial-checkpoint {checkpoint} lost a prior after training already "
            f"({done['by']}), wanted a plain one, such as that of {LAST} beside it"
        )


def start_adjusted(model: nn.Module, checkpoint: str, prior: Tensor, tau: float) -> None:
    """Prepare a model for training with the logit-adjusted loss, and note that in it.

    Plain cross-entropy left the prior in the head of a checkpoint. It is removed here: the first adjusted loss is then
    the last plain one, and the average labels images as a balanced classifier at once. A head that is adjusted already
    stays, and so does a new one, beside the weights of a backbone: no prior is in it.

    Args:
        model: A timm model; holds the weights of the checkpoint.
        checkpoint: Where they came from, a run's model.safetensors beside its config.json or a training checkpoint; ''
            for a model with a new head.
        prior: ``(k,)``, of the labels.
        tau: Strength of the loss.

    Raises:
        UserError: If the model's head is no linear layer with a bias.
    """
    if checkpoint and _holds_head(checkpoint, model):
        if done := read_adjustment(Path(checkpoint)):
            _logger.info(f"{checkpoint}: its head is adjusted already ({done}) and stays")
        else:
            shift_head(model, prior, tau)
    setattr(model, ADJUSTMENT, {"by": "loss", "tau": tau})


def _holds_head(checkpoint: str, model: nn.Module) -> bool:
    """Whether a checkpoint, which the model has loaded, holds weights of its head."""
    head = {id(p) for p in model.get_classifier().parameters()}  # type: ignore[operator]
    names = {name for name, p in model.named_parameters() if id(p) in head}
    return bool(names & load_state_dict(checkpoint).keys())


def read_adjustment(checkpoint: Path) -> Mapping[str, Any] | None:
    """What was removed from the head of a checkpoint's model, None for nothing known.

    Raises:
        UserError: If the config.json beside it is damaged.
    """
    if checkpoint.suffix == ".safetensors":
        config, where = checkpoint.with_name(CONFIG), f"--initial-checkpoint {checkpoint}"
        if not config.is_file():
            return None
        done = read_mapping(config, json.loads, where).get(ADJUSTMENT)
        if not (done is None or isinstance(done, dict)):
            raise UserError(f"{where}: {CONFIG}: {ADJUSTMENT} is {short(done)}, wanted a mapping")
        return done
    tau = getattr(load_untrusted(checkpoint).get("args"), "logit_adjust_tau", 0.0)
    return {"by": "loss", "tau": tau} if tau else None
