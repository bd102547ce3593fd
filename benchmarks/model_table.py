"""The README's model table, from the registry: ``python benchmarks/model_table.py``.

GFLOPs are those of ``torch.utils.flop_counter`` at the default input size, multiply and add counted as two operations;
`semivim.ops` registers what its scan and convolution count as.
"""

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from semivim.models import list_models

# Top-1 on ImageNet-1k as hustvl/Vim and MzeroMiko/VMamba state it; none of it was measured here.
PUBLISHED = {
    "vim_tiny_patch16_224": 76.1,
    "vim_tiny_patch16_stride8_224": 78.3,
    "vim_small_patch16_224": 80.5,
    "vim_small_patch16_stride8_224": 81.6,
    "vim_base_patch16_224": 81.9,
    "vmamba_tiny_s2l5": 82.5,
    "vmamba_small_s2l15": 83.6,
    "vmamba_base_s2l15": 83.9,
    "vmamba_tiny_s1l8": 82.6,
    "vmamba_small_s1l20": 83.3,
    "vmamba_base_s1l20": 83.8,
    "vanilla_vmamba_tiny": 82.2,
    "vanilla_vmamba_small": 83.5,
    "vanilla_vmamba_base": 83.7,
}


def flops(name: str) -> float:
    """Operations of one image's forward pass, on the meta device."""
    model = timm.create_model(name, device="meta").eval()
    size = model.pretrained_cfg["input_size"]
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.empty(1, *size, device="meta"))
    return counter.get_total_flops()


def main() -> None:
    print("| model | parameters (M) | GFLOPs | input | pretrained tag, source | published top-1 |")
    print("|---|---|---|---|---|---|")
    for name in list_models():
        with torch.device("meta"):
            model = timm.create_model(name)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        cfg = model.pretrained_cfg
        source = cfg.get("hf_hub_id") or (cfg.get("origin_url") or "").removeprefix("https://github.com/")
        tag = f"`{cfg['tag']}`, {source}" if source else "none"
        size = "x".join(map(str, cfg["input_size"]))
        print(f"| `{name}` | {millions:.2f} | {flops(name) / 1e9:.2f} | {size} | {tag} | {PUBLISHED.get(name, '')} |")


if __name__ == "__main__":
    main()
