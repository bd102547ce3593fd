from contextlib import nullcontext

import pytest
import timm
import torch

import semivim  # noqa: F401
from semivim.data import ImageStream, StreamLoader, View, open_source
from semivim.loss.patch_pixels import normalise_patches, patch_loss, patchify
from semivim.models.arm_decoder import ArmModel, set_fixed_position
from semivim.runs.progress import Progress
from semivim.task.arm import ArmTask, held_out_loss, predicted_images

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_task(directions="forward", cluster=2, dim=32, depth=2, **options):
    torch.manual_seed(2)
    model = ArmModel(timm.create_model("test_vim", num_classes=0, **options), cluster, directions, dim, depth)
    set_fixed_position(model.backbone)
    return ArmTask(model)


def crops(count, split="train", first=0):
    """Crops of the photographs, normalised, ``(count, 3, 32, 32)``."""
    pytest.importorskip("sklearn")
    source = open_source("embedded/photos", split=split)
    view = View((3, 32, 32), MEAN, STD, is_training=False, crop_pct=1.0)
    places = range(first, len(source), len(source) // count)
    return view.load(view([source.image(i) for i in list(places)[:count]], [0] * count), torch.device("cpu"))


def gradients(task):
    return [p.grad for p in task.parameters() if p.grad is not None]


def test_loss_equals_loops_over_clusters_and_patches():
    task, images = make_task(), torch.randn(2, 3, 32, 32)
    model = task.model
    prediction = model.predict(images, False).unflatten(1, (3, 4)).double()
    total = 0.0
    for b in range(2):
        for cluster in range(1, 4):
            a, c = divmod(cluster, 2)
            for patch in range(4):
                u, v = divmod(patch, 2)
                top, left = (2 * a + u) * 8, (2 * c + v) * 8
                x = images[b, :, top : top + 8, left : left + 8].permute(1, 2, 0).flatten().double()
                target = (x - x.mean()) / (x.var() + 1e-6).sqrt()
                total += (prediction[b, cluster - 1, patch] - target).square().sum()
    torch.testing.assert_close(task(images)["loss"].double(), total / (2 * 3 * 4 * 192), rtol=1e-5, atol=0)


def test_two_batches_accumulated_are_one_of_twice_the_size():
    task, images = make_task(), torch.randn(4, 3, 32, 32)
    task(images)["loss"].backward()
    whole = [g.clone() for g in gradients(task)]
    task.zero_grad()
    for half in images.split(2):
        (task(half)["loss"] / 2).backward()
    for a, b in zip(gradients(task), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [2, 5])
def test_both_is_the_mean_of_two_passes(count):
    task, images = make_task("both"), torch.randn(count, 3, 32, 32)
    model, half = task.model, (count + 1) // 2
    patches = normalise_patches(patchify(images, 8))
    losses = []
    for part, backward in ((slice(0, half), False), (slice(half, None), True)):
        target = patches[part][:, model.predicted_positions(backward)]
        losses.append(patch_loss(model.predict(images[part], backward), target) * len(images[part]) / count)
    torch.testing.assert_close(task(images)["loss"], sum(losses))


def test_held_out_loss_does_not_depend_on_the_batches():
    task, images = make_task("both"), torch.randn(5, 3, 32, 32)
    whole = held_out_loss(task.model, [(images, None)], nullcontext)
    parts = held_out_loss(task.model, [(part, None) for part in images.split(2)], nullcontext)
    assert whole == pytest.approx(parts, rel=1e-5)
    patches = normalise_patches(patchify(images, 8))
    wanted = []
    for backward in (False, True):
        target = patches[:, task.model.predicted_positions(backward)]
        wanted.append(patch_loss(task.model.predict(images, backward), target).item())
    assert whole["loss"] == pytest.approx(sum(wanted) / 2, rel=1e-5)
    assert whole["loss_of_zero"] == pytest.approx(191 / 192, abs=1e-3)


def test_bfloat16_gives_nearly_the_same_loss():
    task, images = make_task(), torch.randn(4, 3, 32, 32)
    exact = task(images)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        assert abs(task(images)["loss"] - exact) < 1e-2


def test_loss_starts_above_that_of_predicting_zero_with_arms_decoder():
    """ARM's own patches and decoder: 768 values, 512 channels, 4 blocks."""
    torch.manual_seed(0)
    backbone = timm.create_model("test_vim", num_classes=0, img_size=64, patch_size=16)
    task = ArmTask(ArmModel(backbone, cluster=2))
    set_fixed_position(task.model.backbone)
    images = torch.nn.functional.interpolate(crops(8), (64, 64), mode="bicubic")
    assert 1.1 < task(images)["loss"] < 1.5


def test_one_batch_of_crops_is_learned():
    task, images = make_task(dim=64), crops(8)
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = task(images)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 0.99
    assert losses[30] < 0.9
    assert losses[-1] < 0.5


def test_held_out_crops_are_predicted_better_than_by_zero():
    """Of the right ends of the photographs, which no crop to train on touches."""
    pytest.importorskip("sklearn")
    task, source = make_task(dim=64), open_source("embedded/photos")
    view = View((3, 32, 32), MEAN, STD, scale=(0.3, 1.0), color_jitter=None)
    stream = ImageStream(source, torch.arange(len(source)).numpy(), [view], 16)
    optimizer, means = torch.optim.AdamW(task.parameters(), lr=3e-3), []
    steps = StreamLoader([stream]).steps()
    for _ in range(3):
        losses = []
        for _ in range(20):
            loss = task(next(steps)[0].views[0])["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        means.append(sum(losses) / 20)
    assert means[0] > means[1] > means[2]
    held_out = held_out_loss(task.model, [(crops(16, "validation"), None)], nullcontext)
    assert held_out["loss"] < 0.9 < held_out["loss_of_zero"]


def test_progress_is_the_tasks_state():
    task = make_task()
    task.progress.add({"loss": torch.tensor(1.0)})
    other = ArmTask(task.model, Progress())
    other.load_task_state(task.get_task_state())
    assert other.progress == task.progress
    other.load_task_state(None)
    assert other.progress.num_updates == 1


def test_picture_shows_what_is_read_and_what_is_predicted():
    task, images = make_task(cluster=2), crops(2)
    columns = dict(predicted_images(task.model, images, MEAN, STD, nullcontext))
    assert list(columns) == ["image", "given", "predicted", "true"]
    pixels = (255 * (images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1))).clamp(0, 255)
    assert (columns["image"].float() - pixels).abs().max() <= 1
    first, last = (..., slice(0, 16), slice(0, 16)), (..., slice(16, 32), slice(16, 32))
    grey = (255 * torch.tensor(MEAN)).byte().view(3, 1, 1).expand(2, 3, 16, 16)
    for title, hidden, shown in (("given", last, first), ("true", first, last)):
        assert torch.equal(columns[title][hidden], grey)
        assert torch.equal(columns[title][shown], columns["image"][shown])
    assert torch.equal(columns["predicted"][first], grey)
    assert not torch.equal(columns["predicted"][last], columns["true"][last])
