"""The README's model table, from the registry: ``python benchmarks/model_table.py``.

GFLOPs count multiply and add as two operations at the default input size: matrix products and the patch convolution as
``torch.utils.flop_counter`` does, the scan as 9 per state and token in each direction, the depthwise convolution as 2
per tap.
"""

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import semivim  # noqa: F401  registers the models

# Top-1 on ImageNet-1k as the README of hustvl/Vim states it; none of it was measured here.
PUBLISHED = {
    "vim_tiny_patch16_224": 76.1,
    "vim_tiny_patch16_stride8_224": 78.3,
    "vim_small_patch16_224": 80.5,
    "vim_small_patch16_stride8_224": 81.6,
    "vim_base_patch16_224": 81.9,
}


def flops(name: str) -> float:
    """Operations of one image's forward pass, on the meta device."""
    model = timm.create_model(name, device="meta").eval()
    size = model.pretrained_cfg["input_size"]
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.empty(1, *size, device="meta"))
    tokens = model.pos_embed.shape[1]
    mixer = model.blocks[0].mixer
    channels, states = mixer.A_log.shape
    taps = mixer.conv1d.weight.shape[-1]
    return counter.get_total_flops() + len(model.blocks) * 2 * tokens * channels * (9 * states + 2 * taps)


def main() -> None:
    print("| model | parameters (M) | GFLOPs | input | pretrained tag, source | published top-1 |")
    print("|---|---|---|---|---|---|")
    names = [n for n in timm.list_models() if n.startswith(("vim_", "semivim_"))]
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        cfg = model.pretrained_cfg
        tag = f"`{cfg['tag']}`, {cfg['hf_hub_id']}" if cfg.get("hf_hub_id") else "none"
        size = "x".join(map(str, cfg["input_size"]))
        print(f"| `{name}` | {millions:.2f} | {flops(name) / 1e9:.2f} | {size} | {tag} | {PUBLISHED.get(name, '')} |")


if __name__ == "__main__":
    main()
