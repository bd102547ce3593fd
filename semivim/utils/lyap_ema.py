"""LyapEMA (Semi-ViM section 4.1, Algorithm 1): a timm ModelEmaV3 whose decay and reach follow a Lyapunov function.

Notation: S student, T teacher (trainable parameters), u the student as the optimizer left it, delta = ||u - T||,
d = ||S_t - T_{t-1}||, V = 0.5 ||S - T||^2, lambda the pull towards the teacher, gamma the sensitivity.
After a teacher update S_t - T_t = alpha (S_t - T_{t-1}), hence V_t = 0.5 (alpha d)^2: one norm gives both alpha and
V, and the test of V is decided before the teacher is written.
"""

import logging
import math
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import nn

from semivim.utils.lyap_literal import literal_step
from semivim.utils.lyapunov import (
    LyapStats,
    Pairs,
    adaptive_decay,
    lyapunov_bound,
    lyapunov_value,
    projection_factor,
)
from semivim.utils.process_group import in_process_group

_logger = logging.getLogger(__name__)

REF_MOMENTUM = 0.99  # running mean of d, over about 100 steps
GUARD_WINDOW = 1000  # steps of the running guard rate
GUARD_ALARM = 0.2
STEPLESS_ALARM = 50  # a GradScaler that starts at 2^16 leaves out 16 steps at most before it reaches 1
CHUNK_NUMEL = 2**24  # few launches on an accelerator
CPU_CHUNK_NUMEL = 2**17  # few fresh pages on a CPU, where the difference then stays in cache

# What a mode fixes; a name that a mode lacks does not apply to it.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {"decay": 0.9999, "min_decay": 0.99, "use_warmup": True, "gamma": 3.0, "v_radius": 0.2},
    "paper_stable": {"gamma": 50.0, "v_radius": 0.1},
    "literal": {"gamma": 1.0, "pull": 0.01, "pull_step": 0.01},
}
_NO_WEIGHT = "model has no trainable weight of two or more dimensions that weight decay may act on"
_STATE = ("v", "ref", "pull", "lr_scale", "guard_rate")


class LyapEmaV3(ModelEmaV3):
    """Drop-in for timm's ModelEmaV3 with the LyapEMA controller of Semi-ViM.

    What was measured on small semi-supervised runs: Algorithm 1 as printed (mode ``literal``) stops training within 20
    steps, as V starts at 0, can only fail its test and halves the learning rate without recovery. Stated as a trust
    region (mode ``default``: V must fall whenever it lies outside a ball of radius ``v_radius`` times the norm of the
    teacher's weights, inside it may grow up to the ball) it turns collapses into recoveries and changes nothing in calm
    training. Weights are what weight decay acts on. With the norm of all parameters the ball means nothing for a Vim:
    A_log, the step sizes' biases and the gains are 98 % of that norm's square, and the guard let a Vim collapse.

    Modes are presets; an option left at None takes the mode's value, one that the mode does not use is refused:

    ============== ===================================================================================================
    default        alpha from d over its running mean, in [min_decay, decay] = [0.99, 0.9999], gamma 3, under the
                   warm-up's cap; guard at v_radius 0.2. Runs under 5,000 updates: decay 0.999, min_decay 0.9.
    paper_stable   Eq. (9) on d over the norm of the teacher's weights, gamma 50; guard at v_radius 0.1.
    literal        Algorithm 1 as printed: Eq. (9) on d, explicit pull of Eq. (8), one recomputation with half the
                   learning rate and lambda + pull_step when V does not fall (``lyap_literal.py``). For study; needs
                   :meth:`attach`.
    ============== ===================================================================================================

    Differences from ModelEmaV3: ``update`` edits the *student* where the guard asks for it;
    the first update does not copy the student unless ``update_after_step > 0``; the warm-up caps alpha and may push it
    below ``min_decay`` (turn it off for a teacher that starts better than the student); the teacher lives on the
    student's device. Distance and guard act on parameters that require gradients, all else is averaged or copied as
    ModelEmaV3 does. With torch.distributed every rank must call ``update``: two scalars are taken from rank 0, which
    keeps the replicas equal to the bit. The scalars that a resume needs are in :meth:`lyap_state_dict`, not in
    ``state_dict``, whose keys stay ``module.*``.

    Args:
        model: Student; its copy becomes the teacher ``module``.
        decay: Largest alpha.
        min_decay: Alpha for a student on top of its teacher; with None the mode's, or ``decay`` where that is less.
        update_after_step: Number of steps during which the teacher copies the student.
        use_warmup: Cap alpha by ``1 - (1 + step / warmup_gamma) ** -warmup_power``.
        warmup_gamma: As in ModelEmaV3.
        warmup_power: As in ModelEmaV3.
        device: The student's.
        dtype: As in ModelEmaV3.
        stochastic_rounding: As in ModelEmaV3.
        stochastic_rounding_seed: As in ModelEmaV3.
        foreach: As in ModelEmaV3.
        exclude_buffers: As in ModelEmaV3.
        mode: ``default``, ``paper_stable`` or ``literal``.
        gamma: Sensitivity of alpha to the distance.
        v_radius: Radius of the ball in which V is free, relative to the norm of the teacher's weights.
        pull: Initial lambda of mode ``literal``.
        pull_step: Growth of lambda at each violation in mode ``literal``.
        on_nonfinite: ``raise`` or ``skip`` when the student is not finite; both leave student and teacher alone.

    Raises:
        ValueError: If an option is out of range or does not apply to the mode.

    Source: Semi-ViM Algorithm 1, Eqs. (5)-(11); the trust region is ours.
    """

    def __init__(  # noqa: PLR0913  ModelEmaV3's arguments and ours
        self,
        model: nn.Module,
        decay: float | None = None,
        min_decay: float | None = None,
        update_after_step: int = 0,
        use_warmup: bool | None = None,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        stochastic_rounding: bool = True,
        stochastic_rounding_seed: int = 0,
        foreach: bool = True,
        exclude_buffers: bool = False,
        *,
        mode: str = "default",
        gamma: float | None = None,
        v_radius: float | None = None,
        pull: float | None = None,
        pull_step: float | None = None,
        on_nonfinite: str = "raise",
    ) -> None:
        options = _resolve(
            mode,
            decay=decay,
            min_decay=min_decay,
            use_warmup=use_warmup,
            gamma=gamma,
            v_radius=v_radius,
            pull=pull,
            pull_step=pull_step,
        )
        if on_nonfinite not in ("raise", "skip"):
            raise ValueError(f"on_nonfinite must be 'raise' or 'skip', got {on_nonfinite!r}")
        student_device = next(model.parameters()).device
        if device is not None and torch.empty(0, device=device).device != student_device:
            raise ValueError(f"device must be the student's ({student_device}), got {device}")
        super().__init__(
            model,
            decay=options["decay"],
            min_decay=options["min_decay"],
            update_after_step=update_after_step,
            use_warmup=options["use_warmup"],
            warmup_gamma=warmup_gamma,
            warmup_power=warmup_power,
            device=device,
            dtype=dtype,
            stochastic_rounding=stochastic_rounding,
            stochastic_rounding_seed=stochastic_rounding_seed,
            foreach=foreach,
            exclude_buffers=exclude_buffers,
        )
        self.mode = mode
        self._is_weight = _weights(model)
        trainable = [p.requires_grad for p in model.parameters()]
        if not any(a and b for a, b in zip(self._is_weight, trainable, strict=True)):
            raise ValueError(_NO_WEIGHT)
        self.gamma = options["gamma"]
        self.v_radius = options["v_radius"]
        self.pull_step = options["pull_step"]
        self.on_nonfinite = on_nonfinite
        # The controller's state: V_{t-1}, running mean of d, lambda, product of the halvings, share of guarded steps.
        self.v = 0.0
        self.ref = 0.0
        self.pull = options["pull"]
        self.lr_scale = 1.0
        self.guard_rate = 0.0
        self._guard_alarmed = False
        self._optimizer: torch.optim.Optimizer | None = None
        self._stepped = False
        self._num_without_step = 0
        self._before: list[torch.Tensor] = []
        if mode == "literal":
            _logger.warning(
                "LyapEMA mode 'literal' is Algorithm 1 as printed: it stops training within about 20 steps."
            )

    def attach(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Follow the steps of ``optimizer``, so that ``update`` does nothing after a step that did not happen.

        A GradScaler does not call ``optimizer.step`` on infinite gradients; the update that follows is then skipped.
        Mode ``literal`` needs it for the student before the step and for the learning rate. That is halved through
        ``group['lr']`` and ``group['lr_scale']``, which timm's schedulers multiply by.

        A copy of this average is not attached. A wrapper that calls no hooks (timm's Lookahead, accelerate's
        AcceleratedOptimizer) is followed through the optimizer that it wraps.

        Raises:
            ValueError: If neither ``optimizer`` nor one that it wraps calls step hooks.
        """
        optimizer = _hooked(optimizer)
        self._optimizer = optimizer

        def before(*_: object) -> None:
            if self.mode == "literal":
                self._before = [p.detach().clone() for p in model.parameters() if p.requires_grad]

        def after(*_: object) -> None:
            self._stepped = True

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)

    def __getstate__(self) -> dict[str, Any]:
        """State of a copy or a pickle, which is not attached: the optimizer's hooks belong to this average."""
        return self.__dict__ | {"_optimizer": None, "_stepped": False, "_num_without_step": 0, "_before": []}

    def get_decay(self, step: int | None = None) -> float:
        """Largest alpha at ``step``: ``decay``, or the warm-up's cap, which never starts at 0."""
        if step is None:
            return self.decay
        step = max(1, step - self.update_after_step)
        if self.update_after_step > 0 and step <= 1:
            return 0.0
        if not self.use_warmup:
            return self.decay
        return min(1.0 - (1.0 + step / self.warmup_gamma) ** -self.warmup_power, self.decay)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int | None = None) -> LyapStats:
        """Update teacher, and student where the guard asks for it, after an optimizer step.

        With all parameters frozen there is nothing to guard: buffers and frozen parameters are averaged as always.

        Args:
            model: Student, wrapped or not.
            step: Number of this update, from 1; None leaves out warm-up and ``update_after_step``.

        Raises:
            FloatingPointError: If the student is not finite and ``on_nonfinite`` is ``raise``.
            RuntimeError: If mode ``literal`` was not attached to an optimizer.
            ValueError: If parameters require gradients, but none of them is a weight.
        """
        if self._optimizer is not None and not self._stepped:
            self._watch_steps()
            return self._unchanged()
        self._stepped, self._num_without_step = False, 0
        triples = zip(model.parameters(), self.module.parameters(), self._is_weight, strict=True)
        pairs = Pairs([], [], [])
        for s, t, is_weight in triples:
            if s.requires_grad:
                pairs.student.append(s)
                pairs.teacher.append(t)
                if is_weight:
                    pairs.weights.append(t)
        cap = self.get_decay(step)
        if not pairs.student:
            alpha, nan = self._alpha(0.0, 0.0, cap), math.nan
            stats = LyapStats(alpha, 0.0, self.v, nan, 0.0, nan, 0.0, self.lr_scale, False, False)
        elif not pairs.weights:
            raise ValueError(_NO_WEIGHT)
        else:
            stats = (self._literal if self.mode == "literal" else self._project)(pairs, cap)
        if stats.skipped:
            return stats
        if self.exclude_buffers:
            self.apply_update_no_buffers_(model, stats.alpha)
        else:
            self.apply_update_(model, stats.alpha)
        self.v = stats.v
        if pairs.student:
            self.ref = REF_MOMENTUM * (self.ref or stats.distance) + (1.0 - REF_MOMENTUM) * stats.distance
        self._watch(stats.violated)
        return stats

    @torch.no_grad()
    def set(self, model: nn.Module) -> None:
        """Copy the student into the teacher; V is then 0 and the running mean of d starts anew."""
        super().set(model)
        self.v = self.ref = 0.0

    def lyap_state_dict(self) -> dict[str, float]:
        """Scalars that a resumed run needs beside ``state_dict``."""
        return {name: getattr(self, name) for name in _STATE}

    def load_lyap_state_dict(self, state: dict[str, float]) -> None:
        """Restore what :meth:`lyap_state_dict` returned."""
        if set(state) != set(_STATE):
            raise ValueError(f"state must have the keys {sorted(_STATE)}, got {sorted(state)}")
        for name in _STATE:
            setattr(self, name, float(state[name]))

    def _alpha(self, distance: float, teacher_norm: float, cap: float) -> float:
        if self.mode == "literal":
            scaled = distance
        elif self.mode == "paper_stable":
            scaled = distance / teacher_norm if teacher_norm > 0.0 else 0.0
        else:
            ref = self.ref or distance
            scaled = distance / ref if ref > 0.0 else 0.0
        return min(adaptive_decay(scaled, self.gamma, self.min_decay, self.decay), cap)

    def _project(self, pairs: Pairs, cap: float) -> LyapStats:
        """Hold V to its bound by moving the student towards the teacher."""
        distance, norm = self._measure(pairs)
        if not (math.isfinite(distance) and math.isfinite(norm)):
            return self._nonfinite(distance, norm)
        bound = lyapunov_bound(self.v, norm, self.v_radius)
        alpha = self._alpha(distance, norm, cap)
        c = 1.0
        violated = lyapunov_value(alpha, distance) > bound * (1.0 + 1e-6)
        if violated:
            c = projection_factor(bound, alpha, distance)
            distance *= c
            alpha = self._alpha(distance, norm, cap)
            self._pull(pairs.student, pairs.teacher, 1.0 - c)
        return LyapStats(
            alpha=alpha,
            v=lyapunov_value(alpha, distance),
            v_prev=self.v,
            bound=bound,
            distance=distance,
            teacher_norm=norm,
            pull=1.0 / c - 1.0 if c > 0.0 else math.inf,
            lr_scale=self.lr_scale,
            violated=violated,
            skipped=False,
        )

    def _literal(self, pairs: Pairs, cap: float) -> LyapStats:
        """Move the student as Algorithm 1 as printed does, and halve the learning rate where it says so."""
        if self._optimizer is None:
            raise RuntimeError("mode 'literal' needs attach(optimizer, model) before training")
        step = literal_step(
            pairs, self._before, partial(self._measure, pairs), partial(self._alpha, cap=cap), self.v,
            pull=self.pull, pull_step=self.pull_step,
        )  # fmt: skip
        if step is None:
            return self._nonfinite(*self._measure(pairs))
        self.pull = step.pull
        self.lr_scale *= step.lr_factor
        for group in self._optimizer.param_groups:
            group["lr"] *= step.lr_factor
            group["lr_scale"] = group.get("lr_scale", 1.0) * step.lr_factor
        return LyapStats(
            alpha=step.alpha,
            v=lyapunov_value(step.alpha, step.distance),
            v_prev=self.v,
            bound=self.v,
            distance=step.distance,
            teacher_norm=step.teacher_norm,
            pull=step.pull,
            lr_scale=self.lr_scale,
            violated=step.violated,
            skipped=False,
        )

    def _measure(self, pairs: Pairs) -> tuple[float, float]:
        """||student - teacher|| and the norm of the teacher's weights, with one host sync, equal on all ranks."""
        norms: list[torch.Tensor] = []
        for student, teacher in _chunks(pairs):
            if self.foreach:
                norms.extend(torch._foreach_norm(torch._foreach_sub(student, teacher)))
            else:
                norms.extend(torch.linalg.vector_norm(s - t) for s, t in zip(student, teacher, strict=True))
        weights = [_wide(w) for w in pairs.weights]
        if self.foreach:
            weight_norms = list(torch._foreach_norm(weights))
        else:
            weight_norms = [torch.linalg.vector_norm(w) for w in weights]
        scalars = torch.stack([_total(norms), _total(weight_norms)])
        if in_process_group():
            dist.broadcast(scalars, src=0)
        distance, norm = scalars.tolist()
        return distance, norm

    def _pull(self, student: list[torch.Tensor], teacher: list[torch.Tensor], weight: float) -> None:
        """S <- S + weight (T - S)."""
        if self.foreach and all(s.dtype == t.dtype for s, t in zip(student, teacher, strict=True)):
            torch._foreach_lerp_(student, teacher, weight)
            return
        for s, t in zip(student, teacher, strict=True):
            s.copy_(_wide(s).lerp(_wide(t), weight))

    def _unchanged(self) -> LyapStats:
        nan = math.nan
        return LyapStats(1.0, self.v, self.v, nan, nan, nan, nan, self.lr_scale, False, True)

    def _nonfinite(self, distance: float, norm: float) -> LyapStats:
        if self.on_nonfinite == "raise":
            raise FloatingPointError(
                f"student is not finite: its distance to the teacher is {distance}, the norm of the teacher's weights "
                f"{norm}; both are left as they are (lower the learning rate, or on_nonfinite='skip')"
            )
        return self._unchanged()

    def _watch_steps(self) -> None:
        """Say once when the attached optimizer seems not to be the one that trains."""
        self._num_without_step += 1
        if self._num_without_step == STEPLESS_ALARM:
            _logger.warning(
                "LyapEMA left the teacher alone in the last %d updates: the attached %s took no step. Attach the "
                "optimizer that trains.",
                STEPLESS_ALARM,
                type(self._optimizer).__name__,
            )

    def _watch(self, violated: bool) -> None:
        """Keep the running guard rate, and say once when the guard rules the training."""
        self.guard_rate += (violated - self.guard_rate) / GUARD_WINDOW
        if self.mode in ("default", "paper_stable") and self.guard_rate > GUARD_ALARM and not self._guard_alarmed:
            self._guard_alarmed = True
            _logger.warning(
                "LyapEMA's guard held the student back in over %.0f%% of the last %d steps: raise v_radius (%g) or "
                "lower the learning rate.",
                100 * GUARD_ALARM,
                GUARD_WINDOW,
                self.v_radius,
            )


def _hooked(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer whose ``step`` calls hooks: itself, or the one that it wraps.

    torch makes ``step`` call hooks in ``Optimizer.__init__``, which wrappers leave out.
    """
    inner: Any = optimizer
    while not getattr(type(inner).step, "hooked", False):
        wrapped = [value for value in vars(inner).values() if callable(getattr(value, "step", None))]
        wrapped = [value for value in wrapped if hasattr(value, "param_groups")]
        if len(wrapped) != 1:
            raise ValueError(
                f"optimizer must call step hooks or wrap one optimizer that does, got {type(optimizer).__name__}, "
                f"whose __init__ does not call torch.optim.Optimizer.__init__"
            )
        inner = wrapped[0]
    return cast(torch.optim.Optimizer, inner)


def _chunks(pairs: Pairs) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Runs of neighbouring parameters whose difference is small beside the model."""
    limit = CPU_CHUNK_NUMEL if pairs.teacher[0].device.type == "cpu" else CHUNK_NUMEL
    student, teacher, numel = [], [], 0
    for s, t in zip(pairs.student, pairs.teacher, strict=True):
        student.append(_wide(s))
        teacher.append(_wide(t))
        numel += s.numel()
        if numel >= limit:
            yield student, teacher
            student, teacher, numel = [], [], 0
    if student:
        yield student, teacher


def _total(norms: list[torch.Tensor]) -> torch.Tensor:
    """Norm of all tensors together."""
    return torch.linalg.vector_norm(torch.stack(norms))


def _weights(model: nn.Module) -> list[bool]:
    """Which parameters weight decay acts on: matrices, but not those that a module takes out, such as A_log.

    Every submodule is asked for the names that it takes out of its own parameters, so a parent module changes nothing.
    """
    kept_out: set[int] = set()
    for module in model.modules():
        listed: Any = getattr(module, "no_weight_decay", None)
        patterns = listed() if callable(listed) else ()
        named = module.named_parameters(remove_duplicate=False) if patterns else ()
        kept_out.update(id(p) for name, p in named if any(fnmatch(name, pattern) for pattern in patterns))
    return [p.ndim > 1 and id(p) not in kept_out for p in model.parameters()]


def _wide(x: torch.Tensor) -> torch.Tensor:
    """At least float32: a difference of nearly equal half-precision weights is mostly rounding."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _resolve(mode: str, **given: float | bool | None) -> dict[str, Any]:
    """The mode's values, with those given in their place."""
    if mode not in PRESETS:
        raise ValueError(f"mode must be one of {sorted(PRESETS)}, got {mode!r}")
    for name, value in given.items():
        if value is not None and name not in PRESETS[mode]:
            raise ValueError(f"{name} does not apply to mode {mode!r}, got {value}; it has {sorted(PRESETS[mode])}")
    # Eq. (9) is the range from 0.5 to 1.
    neutral = {"decay": 1.0, "min_decay": 0.5, "use_warmup": False, "gamma": 0.0, "v_radius": 0.0, "pull": 0.0}
    options = neutral | {"pull_step": 0.0} | PRESETS[mode] | {k: v for k, v in given.items() if v is not None}
    if given.get("min_decay") is None:
        options["min_decay"] = min(options["min_decay"], options["decay"])
    if not 0.0 <= options["min_decay"] <= options["decay"] <= 1.0:
        raise ValueError(
            f"min_decay and decay must satisfy 0 <= min_decay <= decay <= 1, got {options['min_decay']} and "
            f"{options['decay']} in mode {mode!r}"
        )
    for name in ("gamma", "v_radius", "pull", "pull_step"):
        if not 0.0 <= options[name] < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {options[name]}")
    return options
