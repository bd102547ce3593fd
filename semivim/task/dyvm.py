"""The training step of Dynamic Vision Mamba as a timm training task: a frozen Vim teaches the model that leaves out."""

from typing import Any, cast

import torch
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from semivim.loss.dynamic_tokens import distillation_loss, gate_ratio_loss, kept_token_loss, token_ratio_loss
from semivim.loss.pseudo_label import labelled_loss
from semivim.runs.progress import Progress

LOSSES = ("loss_class", "loss_tokens", "loss_gates", "loss_logits", "loss_features")
WEIGHTS = (1.0, 10.0, 10.0, 0.5, 0.5)


class DyVMTask(TrainingTask):
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
        super().__init__(device=device, dtype=dtype, verbose=False)
        self.trainable_module = model
        self.teacher = teacher.eval().requires_grad_(False)
        self.token_ratio = cast(float, model.token_ratio)
        self.block_keep_ratio = cast(float, model.block_keep_ratio)
        self.smoothing = smoothing
        self.progress = progress or Progress()

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

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> "DyVMTask":
        """Wrap the student in DistributedDataParallel; pass ``device_ids=None`` on a CPU."""
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(  # type: ignore[override]
        self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any
    ) -> nn.Module:
        """Compile the student, before :meth:`prepare_distributed`."""
        compiled = torch.compile(self.trainable_module, backend=backend, mode=mode, **compile_kwargs)
        self.trainable_module = self.eval_model = cast(nn.Module, compiled)
        return self.trainable_module

    # ARG002: timm passes its hooks more than this task reads
    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:  # noqa: ARG002
        """The run's progress."""
        return {"progress": self.progress.state_dict()}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,  # noqa: ARG002
        module: nn.Module | None = None,  # noqa: ARG002
        ema: bool = False,  # noqa: ARG002
    ) -> None:
        """Restore what :meth:`get_task_state` returned; None leaves everything as it is."""
        if state is not None:
            self.progress.load_state_dict(state["progress"])
