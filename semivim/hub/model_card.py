"""The model card of a training run: what a reader must know before using the weights, taken from the run's files."""

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from semivim.hub.arm_card import arm_card, check_pretraining, is_pretraining
from semivim.hub.markdown import bullets, inert, plain, table
from semivim.hub.model_folder import read_config
from semivim.runs.run_folder import ARGS, CONFIG, CURVES, METRICS, PIXELS, SUMMARY, WEIGHTS
from semivim.utils.files import load_yaml, read_mapping
from semivim.utils.user_error import UserError, did_you_mean_file, one_line, short

RUN_FILES = (WEIGHTS, CONFIG, ARGS, METRICS, SUMMARY, CURVES)
# Flags that say where a run was written or resumed from: they are no part of how to repeat it.
_PLACE_FLAGS = ("output", "experiment", "resume")
_RECIPE_FLAGS = (
    "ssl_method",
    "pseudo_mixup",
    "threshold",
    "threshold_mode",
    "debias_pseudo",
    "logit_adjust_tau",
    "pseudo_prior",
    "posthoc_debias",
    "unlabeled_ratio",
    "unlabeled_weight",
    "lyap_mode",
    "model_ema_decay",
    "seed",
    "split_seed",
    "pretrained",
    "epochs",
    "batch_size",
    "opt",
    "lr",
    "weight_decay",
    "sched",
    "warmup_epochs",
    "amp",
)
_ROLES = {"best": "published", "teacher": "teacher, last epoch", "student": "student, last epoch"}
_DEBIASED = {  # of a run that removes a prior from the heads at export
    "teacher_debiased": "teacher with a prior removed",
    "student_debiased": "student with a prior removed",
}
_MODELS = ("teacher", "student", *_DEBIASED)  # what best.model names; runs before it was written saved the teacher
_SPLIT = ("sha256", "num_labelled", "num_unlabelled")
# the entries of metrics.json that a card needs, with theirs
_NEEDED: dict[str, tuple[str, ...]] = {
    "student": (),
    "teacher": (),
    "best": ("epoch",),
    "split": (*_SPLIT, "labels_per_class"),
}
_PATTERNS = {"epoch": r"\d+", "num_labelled": r"\d+", "num_unlabelled": r"\d+", "sha256": "[0-9a-f]{64}"}
# Endings of flags whose value is a file or folder.
_PATH_FLAGS = ("_dir", "_list", "_path", "_map", "_checkpoint")
_METRICS = {
    "top1": "top-1 (%)",
    "top5": "top-5 (%)",
    "balanced_acc": "balanced accuracy (%)",
    "worst_class_recall": "worst class recall (%)",
    "many": "recall, many-label classes (%)",
    "medium": "recall, medium-label classes (%)",
    "few": "recall, few-label classes (%)",
}
_CITATION = """\
@inproceedings{he2025semivim,
  title     = {Semi-ViM: Bidirectional State Space Model for Mitigating Label Imbalance in Semi-Supervised Learning},
  author    = {He, Hongyang and Xie, Hongyang and You, Haochen and Sanchez, Victor},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  year      = {2025}
}
@article{zhu2024vision,
  title   = {Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model},
  author  = {Zhu, Lianghui and Liao, Bencheng and Zhang, Qian and Wang, Xinlong and Liu, Wenyu and Wang, Xinggang},
  journal = {arXiv preprint arXiv:2401.09417},
  year    = {2024}
}"""


@dataclass(frozen=True)
class Run:
    """The readable files of a finished run folder."""

    folder: Path
    args: dict[str, Any]
    config: dict[str, Any]
    metrics: dict[str, Any]
    epochs: int


def read_run(folder: Path) -> Run:
    """Read a folder written by train_ssl.py or train_arm.py.

    Args:
        folder: The run folder.

    Raises:
        UserError: If a file is missing, unreadable or without the values a card needs.
    """
    where = f"run folder {folder}"
    missing = [name for name in RUN_FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{where} lacks {', '.join(missing)}: wanted that of a finished run of train_ssl.py or train_arm.py"
            f"{did_you_mean_file(folder)}"
        )
    args = read_mapping(folder / ARGS, load_yaml, where)
    if odd := [key for key in args if not (isinstance(key, str) and re.fullmatch(r"[a-z][a-z0-9_]*", key))]:
        raise UserError(f"{where}: {ARGS}: wanted names of flags, got {short(odd[0])}")
    config = read_config(folder, where)
    if "num_classes" not in config:
        raise UserError(f"{where}: {CONFIG} lacks num_classes")
    names = config.get("label_names")
    if names is not None and len(names) != config["num_classes"]:
        raise UserError(f"{where}: {CONFIG}: wanted {config['num_classes']} label_names, got {short(names)}")
    metrics = read_mapping(folder / METRICS, json.loads, where)
    if is_pretraining(metrics):
        check_pretraining(metrics, where)
    else:
        _check_metrics(metrics, config["num_classes"], where)
    try:
        with (folder / SUMMARY).open(newline="", encoding="utf-8") as file:
            epochs = len(list(csv.DictReader(file)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{where}: {SUMMARY}: {one_line(error)}") from error
    return Run(folder, args, config, metrics, epochs)


def _check_metrics(metrics: dict[str, Any], num_classes: int, where: str) -> None:
    """Refuse metrics.json if it lacks what the card shows, or counts other classes than the model."""
    pseudo = {"pseudo_labels": ()} if metrics.get("pseudo_labels") else {}
    debiased = {role: () for role in _DEBIASED if role in metrics}
    for role, keys in (_NEEDED | debiased | pseudo).items():
        entry = metrics.get(role)
        if not isinstance(entry, dict):
            raise UserError(f"{where}: {METRICS}: wanted a mapping {role}, got {type(entry).__name__}")
        absent = [key for key in keys if key not in entry]
        if absent:
            raise UserError(f"{where}: {METRICS}: {role} lacks {', '.join(absent)}")
        for key in ("labels_per_class", "per_class_recall", "recall", "precision"):
            values = entry.get(key, [None] * num_classes)
            if not (isinstance(values, list) and len(values) == num_classes and all(map(_is_number, values))):
                wanted = f"a list of {num_classes} numbers, one a class, as {role}.{key}"
                raise UserError(f"{where}: {METRICS}: wanted {wanted}, got {short(values)}")
        if role == "best" and entry.get("model", "teacher") not in _MODELS:
            wanted = f"{' or '.join(_MODELS)} as best.model"
            raise UserError(f"{where}: {METRICS}: wanted {wanted}, got {short(entry['model'])}")
        means = entry.get("means", {})
        if not (isinstance(means, dict) and all(re.fullmatch("[a-z_]+", k) and _is_number(means[k]) for k in means)):
            raise UserError(f"{where}: {METRICS}: wanted names and numbers as {role}.means, got {short(means)}")
        _check_patterns(entry, role, where)
        for key in _METRICS:
            if not _is_number(entry.get(key)):
                raise UserError(f"{where}: {METRICS}: wanted a number as {role}.{key}, got {short(entry[key])}")


def _check_patterns(entry: dict[str, Any], role: str, where: str) -> None:
    for key, pattern in _PATTERNS.items():
        if key in entry and not re.fullmatch(pattern, str(entry[key])):
            raise UserError(f"{where}: {METRICS}: {role}.{key} is {short(entry[key])}, wanted {pattern}")


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float)


def _pixel_rules(config: dict[str, Any]) -> dict[str, Any]:
    """How images became pixels of 8 bits, where config.json says it."""
    if PIXELS not in config:
        return {}
    colour, max_value = config[PIXELS]["alpha_background"], config[PIXELS]["max_value"]
    background = "none, alpha is the fourth channel" if colour is None else f"#{bytes(colour).hex()}"
    return {"alpha_background": background} | ({"max_value": max_value} if max_value else {})


def public_args(args: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The flags that repeat a run elsewhere, and the flags whose value is a path of this machine.

    Args:
        args: Flags of the run, as in ``args.yaml``.

    Returns:
        Flags to publish, and the names of those left out because the reader has to fill in a path of their own.
    """
    local = [key for key, value in args.items() if key not in _PLACE_FLAGS and _is_local(key, value)]
    return {key: value for key, value in args.items() if key not in (*_PLACE_FLAGS, *local)}, local


def public_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """The content of ``metrics.json`` without the names of unreadable images, which are paths of this machine."""
    return {key: value for key, value in metrics.items() if key != "unreadable_images"}


def public_license(run: Run, license_id: str | None) -> str | None:
    """The license given, else that of the pretrained weights the run started from, else None.

    Raises:
        UserError: If it is no identifier.
    """
    stated = run.config.get("pretrained_cfg", {}).get("license")
    if license_id is None and run.args.get("pretrained") and stated is not None:
        check_license(stated, f"{run.folder}: {CONFIG}: license (give --license)")
        return stated
    return license_id


def check_license(license_id: Any, what: str) -> None:
    """Refuse what cannot be an identifier of a license.

    Raises:
        UserError: If it is anything else.
    """
    if not (isinstance(license_id, str) and re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", license_id)):
        raise UserError(f"{what}: wanted an identifier of the Hub's like apache-2.0, got {short(license_id)}")


def public_config(run: Run, license_id: str | None) -> dict[str, Any]:
    """The content of ``config.json``, without what timm keeps there of the weights the run started from, or might have.

    Args:
        run: The run.
        license_id: License of its weights; None for none.
    """
    kept = {
        key: value
        for key, value in run.config.get("pretrained_cfg", {}).items()
        if key not in ("tag", "description", "license")
    }
    if license_id:
        kept["license"] = license_id
    return {**run.config, "pretrained_cfg": kept}


def model_card(run: Run, repo_id: str, revision: str, version: str, license_id: str | None) -> str:
    """The README.md of a published run.

    Args:
        run: The run.
        repo_id: ``org/name``.
        revision: Tag to load, or "" for the main branch.
        version: Version of this package.
        license_id: License of the weights; None for none.

    Returns:
        Markdown with the Hub's YAML head.
    """
    if is_pretraining(run.metrics):
        return arm_card(run.config, run.metrics, *public_args(run.args), repo_id, revision, version, license_id)
    architecture, split = run.config["architecture"], run.metrics["split"]
    terms = f"{license_id}, for the weights." if license_id else "None is stated for the weights: ask their publisher."
    args, local = public_args(run.args)
    command = " ".join(["python train_ssl.py -c args.yaml", *(f"--{_flag(key)} {key.upper()}" for key in local)])
    data = plain(args.get("dataset") or "a folder of images")
    best = run.metrics["best"]
    name = best.get("model", "teacher")
    published = f"{_DEBIASED.get(name, name)} at epoch {best['epoch']}"
    recipe = {key: args[key] for key in _RECIPE_FLAGS if args.get(key) is not None} | _pixel_rules(run.config)
    pseudo = run.metrics.get("pseudo_labels") or {}
    pseudo_means = {f"pseudo-labels, {key}": _number(value) for key, value in pseudo.get("means", {}).items()}
    source = f"hf-hub:{repo_id}" + (f"@{revision}" if revision else "")
    images = f"{split['num_labelled']} labelled images"
    if args.get("ssl_method") != "supervised":
        images += f" and {split['num_unlabelled']} unlabelled ones"
        if isinstance(said := run.metrics.get("pseudo_labels"), dict) and said.get("fault"):
            images += f" (but {inert(said['fault'])})"
    head = ModelCardData(
        license=license_id,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "semivim", "vision-mamba", "semi-supervised-learning"],
        model_name=repo_id.split("/")[-1],
        eval_results=_eval_results(best, data),
    )
    text = f"""\
---
{head.to_yaml()}
---
# {head.model_name}

A {inert(architecture)} for {run.config["num_classes"]} classes, trained on {images}. \
The weights are those of the {published} of 0 to {run.epochs - 1}, the best of student and teacher \
on the validation split{_by_metric(args)}.

## Use

```python
import semivim, timm  # pip install semivim
model = timm.create_model("{source}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

or, for the labels of one image file: `semivim predict IMAGE --model {source}`

## Results

On the run's validation split; "published" is the {published}.

{_metrics_table(run.metrics)}

### Recall of each class

{_recall_table(run)}

![loss, accuracy and share of unlabelled images kept, over the run](curves.png)

## Training

{bullets({"data": data, **{f"split {key}": split[key] for key in _SPLIT}})}
{bullets({**recipe, "epochs run": run.epochs, "semivim": version})}
{bullets(pseudo_means)}

Every flag is in `args.yaml`, every number in `metrics.json`, every epoch in `summary.csv`.

## Reproduce

```sh
hf download {repo_id} args.yaml --local-dir .
{command}
```

The labelled images follow from `split_seed` or the list given; `metrics.json` of the new run holds the SHA-256 of its \
split, which has to be the one above.

## Intended use and limits

Classifying images like those of the training data, and as a start for fine-tuning. On unlabelled images \
the model learned from its own guesses, and classes with few labels are the least reliable (see the recall of \
each class). It has not been tested on other data, and not for decisions about people.

## License

{terms} The training data keeps its own terms.

## Citation

```bibtex
{_CITATION}
@software{{semivim,
  title   = {{semivim}},
  version = {{{version}}},
  license = {{Apache-2.0}},
  note    = {{Vision state-space models for timm, and semi-supervised training on them}}
}}
```
"""
    return str(ModelCard(text))


def _by_metric(args: dict[str, Any]) -> str:
    name = args.get("eval_metric")
    return f" by {inert(_METRICS.get(name, name))}" if isinstance(name, str) else ""


def _eval_results(best: dict[str, Any], data: str) -> list[EvalResult]:
    """Metrics of the published weights, as the Hub shows them."""
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=data if "/" in data else "image-folder",
            dataset_name=data,
            dataset_split="validation",
            metric_type="accuracy" if key == "top1" else key,
            metric_name=title,
            metric_value=best[key],
        )
        for key, title in _METRICS.items()
        if best.get(key) is not None
    ]


def _is_local(key: str, value: Any) -> bool:
    """Whether a flag's value names a place of the machine the run was on."""
    if isinstance(value, dict | list):
        return any(_is_local(key, part) for part in (value.values() if isinstance(value, dict) else value))
    if not isinstance(value, str) or not value:
        return False
    # local-dir:FOLDER as a model, hfds/FOLDER as a data set
    _, _, place = value.rpartition("local-dir:")
    absolute = any(Path(part).expanduser().is_absolute() for part in (place, place.partition("/")[2]))
    return absolute or place != value or key.endswith(_PATH_FLAGS)


def _flag(key: str) -> str:
    return key.replace("_", "-")


def _metrics_table(metrics: dict[str, Any]) -> str:
    roles = _ROLES | {role: title for role, title in _DEBIASED.items() if isinstance(metrics.get(role), dict)}
    rows = [
        (title, *(_number(metrics[role].get(key)) for role in roles))
        for key, title in _METRICS.items()
        if metrics["teacher"].get(key) is not None
    ]
    return table(("metric", *roles.values()), rows)


def _recall_table(run: Run) -> str:
    recalls = {title: run.metrics[role].get("per_class_recall") for role, title in _ROLES.items()}
    pseudo = run.metrics.get("pseudo_labels") or {}
    known = {f"recall (%), {title}": values for title, values in recalls.items() if values}
    known |= {f"pseudo-labels, {key} (%)": pseudo[key] for key in ("recall", "precision") if key in pseudo}
    names = run.config.get("label_names") or [""] * run.config["num_classes"]
    counts = run.metrics["split"]["labels_per_class"]
    rows = [
        (index, name, count, *(_number(values[index]) for values in known.values()))
        for index, (name, count) in enumerate(zip(names, counts, strict=True))
    ]
    return table(("class", "name", "labelled images", *known), rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
