"""What the training tasks of all methods share: one model that trains, and a run's progress in their checkpoints."""

from typing import Any, cast

import torch
from timm.task import TrainingTask
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from semivim.runs.progress import Progress


class RunTask(TrainingTask):
    """A timm training task whose ``trainable_module`` is the one part that is compiled and distributed.

    Args:
        model: The model that trains.
        progress: Position of the run, which checkpoints hold as part of the task's state; a new one if None.
        **options: Arguments of ``TrainingTask``.
    """

    def __init__(self, model: nn.Module, progress: Progress | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.trainable_module = model
        self.progress = progress or Progress()

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs: Any) -> "RunTask":
        """Wrap the model in DistributedDataParallel; pass ``device_ids=None`` on a CPU."""
        self.trainable_module = DistributedDataParallel(self.trainable_module, device_ids=device_ids, **ddp_kwargs)
        return self

    def compile(  # type: ignore[override]
        self, backend: str = "inductor", mode: str | None = None, **compile_kwargs: Any
    ) -> nn.Module:
        """Compile the model, before :meth:`prepare_distributed`."""
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
