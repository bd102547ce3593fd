"""The model card of a backbone that train_arm.py pretrained, taken from the run's files."""

import math
from collections.abc import Sequence
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from semivim.hub.markdown import bullets, inert, table
from semivim.runs.run_folder import METRICS
from semivim.utils.user_error import UserError

_RECIPE_FLAGS = (
    "directions", "cluster", "dec_dim", "dec_depth", "seed", "pretrained", "epochs", "warmup_epochs", "batch_size",
    "grad_accum_steps", "opt", "lr", "lr_base", "weight_decay", "clip_grad", "scale", "amp",
)  # fmt: skip
_CITATION = """\
@inproceedings{ren2025arm,
  title     = {Autoregressive Pretraining with Mamba in Vision},
  author    = {Ren, Sucheng and Li, Xianhang and Tu, Haoqin and Wang, Feng and Shu, Fangxun and Zhang, Lei and
               Mei, Jieru and Yang, Linjie and Wang, Peng and Wang, Heng and Yuille, Alan and Xie, Cihang},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2025}
}"""


def is_pretraining(metrics: dict[str, Any]) -> bool:
    """Whether a run's metrics.json is that of pretraining."""
    return "pretraining" in metrics


def check_pretraining(metrics: dict[str, Any], where: str) -> None:
    """Refuse metrics.json if it lacks what the card shows.

    Raises:
        UserError: With the entry that is missing or no number.
    """
    for role, keys in {"pretraining": ("loss", "loss_of_zero", "images"), "best": ("loss", "epoch")}.items():
        entry = metrics.get(role)
        if not isinstance(entry, dict):
            raise UserError(f"{where}: {METRICS}: wanted a mapping {role}, got {type(entry).__name__}")
        for key in keys:
            value = entry.get(key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"{where}: {METRICS}: wanted a number as {role}.{key}, got {type(value).__name__}")


def arm_card(
    config: dict[str, Any],
    metrics: dict[str, Any],
    args: dict[str, Any],
    local: Sequence[str],
    repo_id: str,
    revision: str,
    version: str,
    license_id: str | None,
) -> str:
    """The README.md of a published backbone.

    Args:
        config: Content of config.json.
        metrics: Content of metrics.json, checked.
        args: Flags to publish.
        local: Names of flags whose value the reader has to fill in.
        repo_id: ``org/name``.
        revision: Tag to load, or "" for the main branch.
        version: Version of this package.
        license_id: License of the weights; None for none.

    Returns:
        Markdown with the Hub's YAML head.
    """
    run, best = metrics["pretraining"], metrics["best"]
    terms = f"{license_id}, for the weights." if license_id else "None is stated for the weights: ask their publisher."
    words = " ".join(f"--{name.replace('_', '-')} {name.upper()}" for name in local)
    source = f"hf-hub:{repo_id}" + (f"@{revision}" if revision else "")
    head = ModelCardData(
        license=license_id,
        library_name="timm",
        pipeline_tag="image-feature-extraction",
        tags=["image-feature-extraction", "timm", "semivim", "vision-mamba", "self-supervised-learning"],
        model_name=repo_id.split("/")[-1],
    )
    recipe = {"data": args.get("dataset") or "a folder of images"}
    recipe |= {key: args[key] for key in _RECIPE_FLAGS if args.get(key) is not None}
    losses = [
        (f"published, epoch {best['epoch']}", f"{best['loss']:.4f}"),
        ("last epoch", f"{run['loss']:.4f}"),
        ("predicting the mean of every patch", f"{run['loss_of_zero']:.4f}"),
    ]
    text = f"""\
---
{head.to_yaml()}
---
# {head.model_name}

A {inert(config["architecture"])} without a classifier, pretrained on {run["images"]:,} images without labels: \
it predicted the pixels of each cluster of patches from the clusters before it (ARM). \
It classifies nothing until it is fine-tuned.

## Use

```python
import semivim, timm  # pip install semivim
model = timm.create_model("{source}", pretrained=True, num_classes=NUM_CLASSES, global_pool="avg")  # fine-tune this
```

The class token was not trained: `global_pool="avg"` reads the mean of the patches instead.

## Results

{table(("on held-out images", "mean squared error of normalised pixels"), losses)}

A low loss is no proof of good features; nothing here says how well the backbone classifies.

![loss over the run](curves.png)

## Training

{bullets({**recipe, "semivim": version})}

## Reproduce

```sh
hf download {repo_id} args.yaml --local-dir .
python train_arm.py -c args.yaml {words}
```

## License

{terms} The training data keeps its own terms.

## Citation

```bibtex
{_CITATION}
```
"""
    return str(ModelCard(text))
