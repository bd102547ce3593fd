"""The training step of Dynamic Vision Mamba as a timm training task: a frozen Vim teaches the model that leaves out."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from semivim.loss.dynamic_tokens import distillation_loss, gate_ratio_loss, kept_token_loss, token_ratio_loss
from semivim.loss.pseudo_label import labelled_loss
from semivim.runs.progress import Progress
from semivim.task.run_task import RunTask

LOSSES = ("loss_class", "loss_tokens", "loss_gates", "loss_logits", "loss_features")
WEIGHTS = (1.0, 10.0, 10.0, 0.5, 0.5)


class DyVMTask(RunTask):
    """Loss of one labelled batch, ``CE + 10 tokens + 10 gates + 0.5 KL + 0.5 MSE`` (see `semivim.loss.dynamic_tokens`).

    Args:
        model: The student, a `DyVM`; its ``token_ratio`` and ``block_keep_ratio`` are what it is taught to keep.
        teacher: The plain Vim of the same size that the student started from; frozen here.
        smoothing: Label smoothing of class indices, in [0, 1).
        progress: Position of the run, which checkpoints hold as part of the task's state; a new one if None.

    Source: Wu et al. 2025, "Dynamic Vision Mamba" (arXiv:2504.04787), and its released ``DyVMLoss_Token_Block``.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        *,
        smoothing: float = 0.0,
        progress: Progress | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, progress, device=device, dtype=dtype, verbose=False)
        self.teacher = teacher.eval().requires_grad_(False)
        self.token_ratio = cast(float, model.token_ratio)
        self.block_keep_ratio = cast(float, model.block_keep_ratio)
        self.smoothing = smoothing

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Compute the loss of one step; updates nothing.

        Args:
            input: Images, ``(b, c, h, w)``.
            target: Class indices ``(b,)`` or soft targets ``(b, num_classes)``.

        Returns:
            ``loss`` with gradient; without gradient ``output`` (logits), its five parts, weighted, under the names of
            ``LOSSES``, and the shares kept of the patches, at the end, and of the directions: ``kept_tokens``,
            ``kept_gates``.
        """
        teacher = cast(Any, self.teacher)
        with torch.no_grad():
            teacher_tokens = teacher.forward_features(input)
            teacher_logits = teacher.forward_head(teacher_tokens)
        logits, tokens, kept, gates = self.trainable_module(input, return_decisions=True)
        last = kept[-1] if len(kept) else torch.ones_like(tokens[:, 1:, 0])
        terms = (
            labelled_loss(logits, target, self.smoothing),
            token_ratio_loss(kept, self.token_ratio),
            gate_ratio_loss(gates, self.block_keep_ratio),
            distillation_loss(logits, teacher_logits),
            kept_token_loss(tokens, teacher_tokens, last),
        )
        parts = [weight * term for weight, term in zip(WEIGHTS, terms, strict=True)]
        return {
            "loss": torch.stack(parts).sum(),
            "output": logits.detach(),
            **{name: part.detach() for name, part in zip(LOSSES, parts, strict=True)},
            "kept_tokens": last.detach().mean(),
            "kept_gates": gates.detach().mean(),
        }

    def train(self, mode: bool = True) -> "DyVMTask":
        """Set the student's mode; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self
