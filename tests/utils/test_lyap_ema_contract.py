"""LyapEmaV3 as a drop-in for timm's ModelEmaV3: equality, resume, AMP, replicas, refused options."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from timm.optim import Lookahead
from timm.utils import ModelEmaV3
from torch import nn

import semivim.utils.lyap_ema as lyap_ema
from semivim.utils.lyap_ema import LyapEmaV3
from semivim.utils.lyapunov import LyapStats
from tests.utils.lyap_toy import (
    PROJECTING,
    assert_same,
    copies,
    distance,
    make_model,
    make_optimizer,
    snapshot,
    spiked_run,
    teacher_of,
    train_step,
    trained,
)

# --- invariants 7 and 12: timm's ModelEmaV3 --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", PROJECTING)
@pytest.mark.parametrize("exclude_buffers", [False, True])
def test_foreach_and_loop_paths_agree(mode: str, exclude_buffers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lyap_ema, "CPU_CHUNK_NUMEL", 100)
    results = []
    for foreach in (True, False):
        model = make_model()
        ema = LyapEmaV3(model, mode=mode, foreach=foreach, exclude_buffers=exclude_buffers)
        stats = spiked_run(ema, model, range(1, 41))
        assert any(s.violated for s in stats)
        results.append((stats, model.state_dict(), ema.state_dict()))
    assert results[0][0] == results[1][0]
    assert_same(results[0][1], results[1][1])
    assert_same(results[0][2], results[1][2])


def test_chunks_do_not_change_the_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    for numel in (1, 100, 2**20):
        monkeypatch.setattr(lyap_ema, "CPU_CHUNK_NUMEL", numel)
        model = make_model()
        ema = LyapEmaV3(model)
        train_step(model, make_optimizer(model), 0)
        measured.append(ema.update(model).distance)
    assert measured == pytest.approx([measured[0]] * 3, rel=1e-6)


def test_contract_of_model_ema() -> None:
    model = make_model()
    ema, timm_ema = LyapEmaV3(model, 0.999, 0.5), ModelEmaV3(model, 0.999, 0.5)
    assert ema.state_dict().keys() == timm_ema.state_dict().keys()
    assert not ema.module.training
    assert (ema.decay, ema.min_decay) == (0.999, 0.5)
    assert set(vars(timm_ema)) <= set(vars(ema))
    x = torch.randn(3, 12)
    assert torch.equal(ema(x), ema.module(x))
    spiked_run(ema, model, range(1, 25))
    for twin in (copy.deepcopy(ema), pickle.loads(pickle.dumps(ema))):
        assert_same(twin.state_dict(), ema.state_dict())
        assert twin.lyap_state_dict() == ema.lyap_state_dict()
    ema.set(model)
    assert_same(ema.module.state_dict(), model.state_dict())
    assert (ema.v, ema.ref) == (0.0, 0.0)


def test_decay_below_the_modes_least_decay_is_taken_as_model_ema_takes_it() -> None:
    model = make_model()
    ema, timm_ema = LyapEmaV3(model, 0.98, use_warmup=False), ModelEmaV3(model, 0.98)
    assert (ema.decay, ema.min_decay) == (0.98, 0.98)
    with torch.no_grad():
        model[0].weight.mul_(1.01)
    assert ema.update(model).alpha == 0.98
    timm_ema.update(model)
    assert_same(ema.state_dict(), timm_ema.state_dict())
    assert LyapEmaV3(model, 0.999).min_decay == 0.99


# --- invariant 8: resume ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [*PROJECTING, "literal"])
def test_resume_continues_to_the_bit(mode: str) -> None:
    def build() -> tuple[nn.Module, LyapEmaV3, torch.optim.Optimizer]:
        model = make_model()
        # without the warm-up's cap, which hides the running mean in the first steps
        ema = LyapEmaV3(model, mode=mode, use_warmup=False if mode == "default" else None)
        optimizer = make_optimizer(model, lr=0.05)
        ema.attach(optimizer, model)
        return model, ema, optimizer

    def run(parts: tuple, steps: range) -> None:
        model, ema, optimizer = parts
        for step in steps:
            train_step(model, optimizer, step)
            ema.update(model, step)

    whole, first, resumed = build(), build(), build()
    run(whole, range(1, 21))
    run(first, range(1, 11))
    file = io.BytesIO()
    model, ema, optimizer = first
    torch.save([model.state_dict(), ema.module.state_dict(), ema.lyap_state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for load, state in zip(
        (
            resumed[0].load_state_dict,
            resumed[1].module.load_state_dict,
            resumed[1].load_lyap_state_dict,
            resumed[2].load_state_dict,
        ),
        saved,
        strict=True,
    ):
        load(state)
    run(resumed, range(11, 21))
    assert_same(whole[0].state_dict(), resumed[0].state_dict())
    assert_same(whole[1].state_dict(), resumed[1].state_dict())
    assert whole[1].lyap_state_dict() == resumed[1].lyap_state_dict()


def test_load_refuses_another_set_of_scalars() -> None:
    ema = LyapEmaV3(make_model())
    with pytest.raises(ValueError, match="state must have the keys"):
        ema.load_lyap_state_dict({"v": 1.0})


# --- invariant 9 and non-finite students -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [*PROJECTING, "literal"])
def test_skipped_amp_step_changes_nothing(mode: str) -> None:
    model = make_model()
    ema = LyapEmaV3(model, mode=mode)
    optimizer = make_optimizer(model)
    ema.attach(optimizer, model)
    scaler = torch.amp.GradScaler("cpu")

    def step(poison: bool) -> LyapStats:
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(8, 12)).square().mean()).backward()
        if poison:
            model[0].weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        return ema.update(model)

    assert not step(poison=False).skipped
    student, teacher, scalars = copies(trained(model)), snapshot(ema.module), ema.lyap_state_dict()
    assert step(poison=True).skipped
    assert distance(student, trained(model)) == 0.0
    assert_same(ema.module.state_dict(), teacher)
    assert ema.lyap_state_dict() == scalars
    assert not step(poison=False).skipped


class Wrapper(torch.optim.Optimizer):
    """As accelerate's AcceleratedOptimizer: no call of Optimizer.__init__, groups by property."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        for number, optimizer in enumerate(optimizers):
            setattr(self, f"optimizer_{number}", optimizer)

    @property
    def param_groups(self) -> list:
        return self.optimizer_0.param_groups

    def step(self, closure: object = None) -> None:
        self.optimizer_0.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer_0.zero_grad(set_to_none)


@pytest.mark.parametrize("mode", [*PROJECTING, "literal"])
@pytest.mark.parametrize("wrap", [Lookahead, Wrapper, lambda o: Wrapper(Lookahead(o))])
def test_wrapped_optimizer_is_followed(mode: str, wrap: Callable) -> None:
    model = make_model()
    ema = LyapEmaV3(model, mode=mode)
    optimizer = make_optimizer(model)
    wrapped = wrap(optimizer)
    ema.attach(wrapped, model)
    teacher = copies(teacher_of(ema, model))
    for step in range(1, 11):
        model.zero_grad()
        model(torch.randn(8, 12)).square().mean().backward()
        wrapped.step()
        assert not ema.update(model, step).skipped
        assert ema.update(model, step).skipped
    assert distance(teacher, teacher_of(ema, model)) > 0.0
    if mode == "literal":
        assert wrapped.param_groups[0]["lr"] < 1e-2


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda ema: pickle.loads(pickle.dumps(ema))])
def test_copy_of_an_attached_average_is_detached_and_works(twin_of: Callable) -> None:
    model = make_model()
    ema = LyapEmaV3(model)
    optimizer = make_optimizer(model)
    ema.attach(optimizer, model)
    twin = twin_of(ema)
    for step in range(1, 6):
        train_step(model, optimizer, step)
        assert ema.update(model, step) == twin.update(model, step)
        assert ema.update(model, step).skipped
    assert_same(twin.state_dict(), ema.state_dict())
    twin.attach(optimizer, model)
    assert twin.update(model).skipped


def test_optimizer_without_hooks_is_refused_by_name() -> None:
    model = make_model()
    for wrapped in (Wrapper(), Wrapper(make_optimizer(model), make_optimizer(model))):
        with pytest.raises(ValueError, match=r"optimizer must call step hooks .*, got Wrapper"):
            LyapEmaV3(model).attach(wrapped, model)


def test_optimizer_that_takes_no_step_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()
    ema = LyapEmaV3(model)
    ema.attach(make_optimizer(model), model)
    other = make_optimizer(model)
    for step in range(120):
        train_step(model, other, step)
        assert ema.update(model).skipped
    assert [record.getMessage() for record in caplog.records] == [
        "LyapEMA left the teacher alone in the last 50 updates: the attached AdamW took no step. Attach the optimizer "
        "that trains."
    ]


@pytest.mark.parametrize("mode", [*PROJECTING, "literal"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_student_touches_nothing(mode: str, bad: float) -> None:
    for on_nonfinite in ("raise", "skip"):
        model = make_model()
        ema = LyapEmaV3(model, mode=mode, on_nonfinite=on_nonfinite)
        optimizer = make_optimizer(model)
        ema.attach(optimizer, model)
        train_step(model, optimizer, 0)
        with torch.no_grad():
            model[0].weight[0, 0] = bad
        student, teacher, scalars = snapshot(model), snapshot(ema.module), ema.lyap_state_dict()
        if on_nonfinite == "raise":
            with pytest.raises(FloatingPointError, match="student is not finite"):
                ema.update(model)
        else:
            assert ema.update(model).skipped
        assert_same(ema.module.state_dict(), teacher)
        assert ema.lyap_state_dict() == scalars
        for name, value in model.state_dict().items():
            assert torch.equal(value.nan_to_num(), student[name].nan_to_num()), name


# --- invariant 11: replicas ------------------------------------------------------------------------------------------


def replica(rank: int, folder: str) -> None:
    """One of two ranks, the second of which measures norms that are off by 3e-7; runs with and without the sync."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    exact = lyap_ema._total
    lyap_ema._total = lambda norms: exact(norms) * (1 + 3e-7 * rank)
    runs = []
    for _ in range(2):
        model = make_model()
        ema = LyapEmaV3(model)
        assert any(s.violated for s in spiked_run(ema, model, range(1, 41)))
        runs.append([model.state_dict(), ema.state_dict(), ema.lyap_state_dict()])
        lyap_ema.dist.broadcast = lambda *args, **kwargs: None
    torch.save(runs, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_replicas_stay_equal_to_the_bit(tmp_path: Path) -> None:
    """Without the broadcast the same run drifts apart."""
    torch.multiprocessing.spawn(replica, (str(tmp_path),), nprocs=2)
    (synced, drifting), (synced_1, drifting_1) = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1)]
    assert_same(synced[0], synced_1[0])
    assert_same(synced[1], synced_1[1])
    assert synced[2] == synced_1[2]
    assert any(not torch.equal(drifting[0][name], drifting_1[0][name]) for name in drifting[0])


# --- refused options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mode": "exact"}, "mode must be one of"),
        ({"mode": "literal", "v_radius": 0.1}, "v_radius does not apply to mode 'literal'"),
        ({"mode": "literal", "decay": 0.99}, "decay does not apply to mode 'literal'"),
        ({"pull": 0.1}, "pull does not apply to mode 'default'"),
        ({"decay": 0.9, "min_decay": 0.95}, "min_decay <= decay"),
        ({"v_radius": -0.1}, "v_radius must be finite and not negative, got -0.1"),
        ({"gamma": float("nan")}, "gamma must be finite and not negative, got nan"),
        ({"v_radius": float("inf")}, "v_radius must be finite and not negative, got inf"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be 'raise' or 'skip', got 'ignore'"),
        ({"device": torch.device("meta")}, "device must be the student's"),
    ],
)
def test_wrong_options_are_named(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LyapEmaV3(make_model(), **kwargs)


@pytest.mark.parametrize("mode", [*PROJECTING, "literal"])
def test_model_that_is_frozen_later_moves_only_buffers(mode: str) -> None:
    model = make_model()
    ema = LyapEmaV3(model, mode=mode)
    ema.attach(make_optimizer(model), model)
    ema._stepped = True
    model.requires_grad_(False)
    model(torch.randn(8, 12))
    teacher, scalars, student = snapshot(ema.module), ema.lyap_state_dict(), snapshot(model)
    stats = ema.update(model)
    assert (stats.v, stats.violated, stats.skipped) == (0.0, False, False)
    assert ema.lyap_state_dict() == scalars
    assert_same(model.state_dict(), student)
    for name, value in ema.module.state_dict().items():
        assert torch.equal(value, teacher[name]) == (name not in dict(model.named_buffers())), name


def test_model_whose_weights_are_frozen_later_is_refused() -> None:
    model = make_model()
    ema = LyapEmaV3(model)
    for p in model.parameters():
        p.requires_grad_(p.ndim == 1)
    with pytest.raises(ValueError, match="no trainable weight"):
        ema.update(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", PROJECTING)
def test_cuda_agrees_with_the_cpu(mode: str) -> None:
    results = []
    for device in ("cpu", "cuda"):
        model = make_model()
        ema = LyapEmaV3(model, mode=mode)
        with torch.no_grad():
            for p in trained(model):
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        model, ema = model.to(device), ema.to(device)
        results.append((ema.update(model), trained(model.cpu())))
    assert results[0][0].violated
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(a, b)


def test_model_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable weight"):
        LyapEmaV3(nn.LayerNorm(4))
