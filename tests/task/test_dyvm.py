import copy

import pytest
import timm
import torch

from semivim.task.dyvm import LOSSES, DyVMTask
from tests.dyvm_models import build_mini, load_golden, replay_noise
from tests.tolerance import sampled


class Recorded(torch.nn.Module):
    """A teacher that gives what the release's gave."""

    def __init__(self, teacher):
        super().__init__()
        patches = teacher["other"]
        self.tokens = torch.cat([patches[:, :24], torch.full_like(patches[:, :1], 9.0), patches[:, 24:]], 1)
        self.logits = teacher["logits"]

    def forward_features(self, x):
        return self.tokens

    def forward_head(self, tokens):
        return self.logits


def test_golden_training_step(monkeypatch):
    golden = load_golden()
    replay_noise(golden, monkeypatch)
    recorded, model = golden["train"], build_mini(golden)
    task = DyVMTask(model, Recorded(golden["teacher"])).train()
    result = task(golden["eval"]["x"], recorded["y"])
    assert result["loss"].item() == pytest.approx(recorded["loss"], abs=1e-6)
    for name, part in zip(LOSSES, recorded["parts"], strict=True):
        assert result[name].item() == pytest.approx(part, abs=1e-6), name
    result["loss"].backward()
    names = {"layers.": "blocks.", "norm_f.": "norm."}
    for name, weight in model.named_parameters():
        released = next((old + name.removeprefix(new) for old, new in names.items() if name.startswith(new)), name)
        wanted, norm = recorded["grads"][released], recorded["grad_norms"][released]
        assert (sampled(weight.grad) - wanted).abs().max() <= 1e-4 * wanted.abs().max(), name
        assert abs(weight.grad.norm() - norm) <= 1e-4 * norm, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_under_autocast_is_finite_and_trains_routers_and_gates(dtype):
    torch.manual_seed(0)
    model, teacher = (timm.create_model(name, num_classes=4) for name in ("test_dyvm", "test_vim"))
    task = DyVMTask(model, teacher).train()
    with torch.autocast("cpu", dtype):
        result = task(torch.randn(8, 3, 32, 32), torch.arange(8) % 4)
    assert result["loss"].dtype == torch.float32 and result["output"].dtype == dtype
    assert all(result[name].isfinite() for name in ("loss", *LOSSES))
    (1024 * result["loss"]).backward()  # as a scaler does for float16
    for name, weight in model.named_parameters():
        assert weight.grad.isfinite().all() and weight.grad.any(), name


def test_training_reaches_the_ratios_and_leaves_the_teacher_alone():
    torch.manual_seed(0)
    sizes = {"num_classes": 4, "depth": 3}
    teacher = timm.create_model("test_vim", **sizes)
    model = timm.create_model("test_dyvm", **sizes, pruning_loc=(1, 2), token_ratio=0.9)
    model.load_vim(teacher.state_dict())
    before = copy.deepcopy(teacher.state_dict())
    task = DyVMTask(model, teacher).train()
    assert model.training and not teacher.training
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x, y = torch.randn(16, 3, 32, 32), torch.arange(16) % 4
    losses, kept = [], []
    for _ in range(60):
        result = task(x, y)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        losses.append(result["loss_tokens"].item())
        kept.append(result["kept_tokens"].item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert sum(kept[:5]) / 5 < 0.4 and abs(sum(kept[-10:]) / 10 - 0.81) < 0.1
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_progress_is_kept():
    model, teacher = timm.create_model("test_dyvm"), timm.create_model("test_vim")
    task = DyVMTask(model, teacher)
    task.progress.num_updates = 7
    other = DyVMTask(timm.create_model("test_dyvm"), teacher)
    other.load_task_state(task.get_task_state())
    assert other.progress.num_updates == 7
    assert not task.has_ema()
    keys = task.get_checkpoint_state()["state_dict"].keys()
    assert keys == model.state_dict().keys()
