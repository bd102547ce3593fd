"""The semi-supervised training step of Semi-ViM as a timm training task (Semi-ViM section 4.3)."""

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn as nn
from timm.utils import ModelEmaV3, unwrap_model
from torch import Tensor

from semivim.data.ssmixup import mix_inputs, mix_probabilistic, mix_targets, mixing_weight, pair_retained
from semivim.loss.pseudo_label import labelled_loss, unlabelled_loss
from semivim.runs.progress import Progress
from semivim.task.pseudo_label_rule import PseudoLabelRule, PseudoLabels
from semivim.task.run_task import RunTask
from semivim.utils.lyap_ema import LyapEmaV3
from semivim.utils.lyapunov import LyapStats
from semivim.utils.user_error import UserError, short

METHODS = ("supervised", "fixmatch", "ema-teacher", "lyapema")
PSEUDO_MIXUPS = ("none", "prob", "ss")


class SemiSupervisedTask(RunTask):
    """Loss of one labelled and one unlabelled batch, ``L = L_labelled + mu * L_unlabelled``.

    Methods differ in the model that gives the weak views their pseudo-labels: the student (``fixmatch``), its
    exponential moving average (``ema-teacher``) or the average kept by :class:`~semivim.utils.lyap_ema.LyapEmaV3`
    (``lyapema``); ``supervised`` uses labelled images only. Every method keeps an average of the student, the teacher,
    which is evaluated beside it.

    Args:
        model: The student, giving ``(b, num_classes)`` logits; with ``pseudo_mixup='ss'`` it takes ``psi`` and ``nu``.
        num_classes: Number of classes.
        method: One of ``METHODS``.
        pseudo_mixup: What replaces the strong view: ``none`` keeps it, ``prob`` mixes pairs of images (Semi-ViT's
            probabilistic pseudo mixup), ``ss`` mixes pairs of images and hidden states (SSMixup).
        rule: Makes pseudo-labels of weak views, and adjusts logits by the priors of the classes; None for a fixed
            threshold of 0.7 and no adjustment.
        unlabelled_weight: ``mu``, not negative.
        smoothing: Label smoothing, in [0, 1), of labelled class indices and of ``prob``'s mixed targets.
        ssmixup_nu: Control coefficient ``nu`` of the hidden-state mix.
        progress: Position of the run, which checkpoints hold as part of the task's state; a new one if None.

    Attributes:
        alpha: Decay of the teacher's last update, None before the first.
        lyap_stats: What that update did, with ``lyapema`` only.

    Raises:
        ValueError: For a method, mixup or range that does not exist.

    Source: Semi-ViM Eq. (12)-(21).
    """

    trainable_module_ema: ModelEmaV3  # the teacher; there after setup_ema()

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        *,
        method: str = "lyapema",
        pseudo_mixup: str = "none",
        rule: PseudoLabelRule | None = None,
        unlabelled_weight: float = 1.0,
        smoothing: float = 0.0,
        ssmixup_nu: float = 0.1,
        progress: Progress | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, progress, device=device, dtype=dtype)
        if method not in METHODS:
            raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
        if pseudo_mixup not in PSEUDO_MIXUPS:
            raise ValueError(f"pseudo_mixup {pseudo_mixup!r} is not one of {', '.join(PSEUDO_MIXUPS)}")
        if unlabelled_weight < 0.0:
            raise ValueError(f"unlabelled_weight is {unlabelled_weight}, wanted 0 or more")
        self.num_classes = num_classes
        self.method = method
        self.pseudo_mixup = pseudo_mixup
        self.rule = rule or PseudoLabelRule(num_classes, device=device)
        self.unlabelled_weight = unlabelled_weight
        self.smoothing = smoothing
        self.ssmixup_nu = ssmixup_nu
        self.alpha: float | None = None
        self.lyap_stats: LyapStats | None = None

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        weak: Tensor | None = None,
        strong: Tensor | None = None,
        ssmixup_ramp: float = 1.0,
    ) -> dict[str, Tensor]:
        """Compute the loss of one step, in the paper's order; updates nothing.

        Args:
            input: Labelled images, ``(b, c, h, w)``.
            target: Class indices ``(b,)`` or soft targets ``(b, num_classes)``.
            weak: Weak views of the unlabelled images, ``(mu_b, c, h, w)``; unused by ``supervised``.
            strong: Strong views of the same images.
            ssmixup_ramp: Share of ``ssmixup_nu`` that applies, in [0, 1]: to switch the mixed hidden state on at once
                costs a trained network accuracy.

        Returns:
            ``loss`` with gradient; without gradient ``output`` (labelled logits), ``loss_labelled``,
            ``loss_unlabelled``, for the unlabelled rows ``confidence``, ``pseudo`` and ``keep`` before mixing, and the
            sums that :meth:`commit` takes.
        """
        if self.method == "supervised":
            output = self.trainable_module(input)
            loss = labelled_loss(self.rule.labelled_logits(output), target, self.smoothing)  # Eq. (20)
            return {"loss": loss, "output": output.detach(), "loss_labelled": loss.detach()}
        if weak is None or strong is None:
            raise ValueError(f"method '{self.method}' needs weak and strong views of unlabelled images, got None")

        labels = self.pseudo_label(weak)  # Eq. (17), (18) and the indicator of Eq. (21)
        views, mixed_target, mixed_keep, readout = self.mix(strong, labels, len(input), ssmixup_ramp)

        # One forward for both branches: one DDP reduction, and no second pass through the layers' weights.
        logits = self.trainable_module(torch.cat([input, views]), **readout)
        output, unlabelled = logits.split([len(input), len(views)])

        supervised = labelled_loss(self.rule.labelled_logits(output), target, self.smoothing)  # Eq. (20)
        unsupervised = unlabelled_loss(self.rule.unlabelled_logits(unlabelled), mixed_target, mixed_keep)  # Eq. (21)
        loss = supervised + self.unlabelled_weight * unsupervised  # Eq. (19)
        return {
            "loss": loss,
            "output": output.detach(),
            "loss_labelled": supervised.detach(),
            "loss_unlabelled": unsupervised.detach(),
            "confidence": labels.confidence,
            "pseudo": labels.pseudo,
            "keep": labels.keep,
            **labels.sums,
        }

    @torch.no_grad()
    def pseudo_label(self, weak: Tensor) -> PseudoLabels:
        """Pseudo-labels of the weak views, from the student (FixMatch) or the teacher (Eq. 17, 18)."""
        if self.method == "fixmatch":
            return self.rule(unwrap_model(self.trainable_module)(weak))
        teacher = self.get_eval_model(ema=True)
        if teacher is None:
            raise ValueError(f"method '{self.method}' needs a teacher: call setup_ema() first")
        return self.rule(teacher(weak))

    def mix(
        self, strong: Tensor, labels: PseudoLabels, num_labelled: int, ssmixup_ramp: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Views, targets and kept rows that train, and the read-out arguments of the student.

        The mixed term replaces the plain one (Eq. 19 has one unlabelled term). Labelled rows get ``nu = 0``: they
        take the unmixed path of the same forward.
        """
        target, confidence, keep = labels.target, labels.confidence, labels.keep
        if self.pseudo_mixup == "none":
            return strong, target, keep, {}
        if self.pseudo_mixup == "prob":
            mixed = mix_probabilistic(strong, target, confidence, self.num_classes, smoothing=self.smoothing)
            return mixed.images, mixed.targets, torch.maximum(keep, keep[mixed.partner]), {}
        partner = pair_retained(keep > 0)
        psi = mixing_weight(confidence, confidence[partner])  # Eq. (12)
        views = mix_inputs(strong, partner, psi)  # Eq. (13)
        mixed_target = mix_targets(target, partner, psi, self.num_classes)  # Eq. (13)
        readout = {  # Eq. (15), (16): the blocks mix psi * h_fwd + (1 - psi) * h_bwd, read with weight nu
            "psi": torch.cat([psi.new_full((num_labelled,), 0.5), psi]),
            "nu": torch.cat([psi.new_zeros(num_labelled), torch.full_like(psi, ssmixup_ramp * self.ssmixup_nu)]),
        }
        return views, mixed_target, keep, readout

    def setup_ema(  # type: ignore[override]
        self,
        decay: float | None = None,
        use_warmup: bool | None = None,
        device: torch.device | None = None,
        **kwargs: Any,
    ) -> ModelEmaV3:
        """Create the teacher, a copy of the student: a ``LyapEmaV3`` for ``lyapema``, else timm's plain ``ModelEmaV3``.

        Arguments are those of either; None takes its default.
        """
        given = {"decay": decay, "use_warmup": use_warmup, "device": device}
        options = kwargs | {name: value for name, value in given.items() if value is not None}
        average = LyapEmaV3 if self.method == "lyapema" else ModelEmaV3
        ema = average(unwrap_model(self.trainable_module), **options)
        ema.module.requires_grad_(False)
        self.trainable_module_ema = ema
        return ema

    def update_ema(self, step: int | None = None) -> None:
        """Move the teacher after an optimizer step that was taken."""
        if not self.has_ema():
            return
        stats = self.trainable_module_ema.update(unwrap_model(self.trainable_module), step=step)
        self.lyap_stats = stats if isinstance(stats, LyapStats) else None
        self.alpha = stats.alpha if isinstance(stats, LyapStats) else self.trainable_module_ema.get_decay(step)

    def commit(self, sums: Mapping[str, Tensor]) -> None:
        """Move the running means of the pseudo-labels after an optimizer step that was taken (see the rule's)."""
        if self.method != "supervised":
            self.rule.commit(sums)

    def train(self, mode: bool = True) -> "SemiSupervisedTask":
        """Set the student's mode; the teacher stays in eval mode."""
        super().train(mode)
        if self.has_ema():
            self.trainable_module_ema.eval()
        return self

    # ARG002: timm passes its hooks more than this task reads
    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:  # noqa: ARG002
        """The run's progress, the teacher's last update, running means; of the teacher (``ema``) Lyapunov scalars."""
        if ema:
            average = self.trainable_module_ema
            return average.lyap_state_dict() if isinstance(average, LyapEmaV3) else {}
        stats = self.lyap_stats._asdict() if self.lyap_stats else None
        state = super().get_task_state() | {"alpha": self.alpha, "lyap_stats": stats}
        return state | ({"pseudo_labels": dict(self.rule.state)} if self.rule.state else {})

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,  # noqa: ARG002
        module: nn.Module | None = None,  # noqa: ARG002
        ema: bool = False,
    ) -> None:
        """Restore what :meth:`get_task_state` returned; None leaves everything as it is."""
        if state is None:
            return
        if ema:
            cast(LyapEmaV3, self.trainable_module_ema).load_lyap_state_dict(state)
        else:
            super().load_task_state(state)
            self.rule.load_state(state.get("pseudo_labels", {}))
            self.alpha = state["alpha"]
            stats = state["lyap_stats"]
            if stats is not None and not (isinstance(stats, Mapping) and stats.keys() == set(LyapStats._fields)):
                raise UserError(f"lyap_stats of a checkpoint: wanted {LyapStats._fields}, got {short(stats)}")
            self.lyap_stats = None if stats is None else LyapStats(**stats)
