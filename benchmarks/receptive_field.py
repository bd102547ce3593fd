"""The effective receptive field of a Vim, a VMamba, a ViT and a ResNet, as VMamba's authors draw it.

Usage: OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python benchmarks/receptive_field.py [--pretrained] [--images 16]

How much each pixel of the input moves the middle of a model's last map: the positive part of the gradient of that
place's positive features, summed over channels and images, as log10(1 + value) over its maximum. The images are noise,
the same for all models; the weights are random unless --pretrained. Draws benchmarks/figures/receptive_field.png, and
prints which share of the pixels, the strongest ones, holds 20, 50 and 99 % of the sum. A ResNet starts with all its
residual branches at work here; timm's usual start leaves them out.

Source: Luo et al. 2016 (arXiv:1701.04128); VMamba (arXiv:2401.10166), section 5.4; the measure is that of RepLKNet
(Ding et al. 2022, arXiv:2203.06717).
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import timm
import torch
from torch import Tensor, nn

import semivim  # noqa: F401  registers the models

SIZE, BATCH = 224, 4
MODELS = {
    "vim_tiny_patch16_224": {},
    "vmamba_tiny_s1l8": {},
    "vit_tiny_patch16_224": {},
    "resnet50": {"zero_init_last": False},
}
SHARES = (0.2, 0.5, 0.99)


def receptive_field(model: nn.Module, images: int) -> Tensor:
    """Sum of the gradients over images and channels, ``(rows, columns)``."""
    total = torch.zeros(SIZE, SIZE)
    for first in range(0, images, BATCH):
        x = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(first)).requires_grad_()
        (y,) = model.forward_intermediates(x, indices=1, intermediates_only=True)
        middle = y[:, :, y.shape[2] // 2, y.shape[3] // 2].relu().sum()
        total += torch.autograd.grad(middle, x)[0].relu().sum((0, 1))
    return total


def area_of(field: Tensor, share: float) -> float:
    """Share of the pixels, those of the largest values, that holds a share of the sum."""
    values = field.flatten().sort(descending=True).values.cumsum(0)
    return (int((values < share * values[-1]).sum()) + 1) / values.numel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretrained", action="store_true", help="load each model's pretrained weights")
    parser.add_argument("--images", type=int, default=16, help="images to sum over (%(default)s)")
    args = parser.parse_args()
    figure, axes = plt.subplots(1, len(MODELS), figsize=(12, 3.3), layout="constrained")
    print(f"{'':24}" + "".join(f"{share:>8.0%}" for share in SHARES))
    for axis, (name, options) in zip(axes, MODELS.items(), strict=True):
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=args.pretrained, **options).eval()
        field = receptive_field(model, args.images)
        print(f"{name:24}" + "".join(f"{area_of(field, share):8.1%}" for share in SHARES))
        shown = (1 + field / field.mean()).log10()
        axis.imshow(shown / shown.max(), cmap="viridis", vmin=0, vmax=1)
        axis.set_title(name, fontsize=10)
        axis.set_axis_off()
    weights = "pretrained" if args.pretrained else "random"
    figure.suptitle(
        f"Effective receptive field of the last map's middle, {weights} weights, {SIZE} x {SIZE}", fontsize=11
    )
    path = Path(__file__).parent / "figures" / "receptive_field.png"
    figure.savefig(path, dpi=100)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
