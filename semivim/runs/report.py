"""The report at the end of a run: a table, a picture and metrics.json."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from semivim.runs.run_folder import CURVES, METRICS
from semivim.utils.files import atomic_path, write_text

METRIC_NAMES = ("top1", "top5", "balanced_acc", "many", "medium", "few", "worst_class_recall")


class Panel(NamedTuple):
    """One plot of the picture: its title, the records' keys that it shows, and the scale of its values."""

    title: str
    keys: Sequence[str]
    scale: str = "linear"


def write_report(
    folder: Path, results: dict[str, Any], records: Sequence[dict[str, Any]], panels: Sequence[Panel], title: str
) -> None:
    """Write metrics.json and curves.png into the run folder.

    Args:
        folder: Run folder.
        results: What metrics.json gets.
        records: Records of the log.
        panels: What the picture shows of them.
        title: Title of the picture.
    """
    write_text(folder / METRICS, json.dumps(results, indent=1))
    save_curves(folder / CURVES, records, panels, title)


def results_table(
    columns: Mapping[str, Mapping[str, Any]],
    class_names: Sequence[str] | None = None,
    pseudo_labels: Mapping[str, Any] | None = None,
) -> str:
    """Metrics of several models side by side, in percent.

    Args:
        columns: Title and metrics (see ``ClassificationMetrics``) of each model; the last says which metrics there are.
        class_names: Names of the classes, if they have any.
        pseudo_labels: ``seen``, ``kept`` and ``fault`` of the unlabelled images (see ``pseudo_label_summary``), if any.
    """
    *_, last = columns.values()
    rows = {name: [metrics[name] for metrics in columns.values()] for name in METRIC_NAMES if name in last}
    per_class = [metrics["per_class_recall"] for metrics in columns.values()]
    if len(per_class[-1]) <= 20:
        names = [*map(repr, class_names or [])]
        names += map(str, range(len(names), len(per_class[-1])))  # --num-classes may be more than the names
        for name, recalls in zip(names, zip(*per_class, strict=True), strict=True):
            if recalls[-1] is not None:
                rows[f"recall of class {name}"] = list(recalls)
    width = max(22, *(len(name) + 1 for name in rows))
    widths = [max(10, len(title) + 2) for title in columns]
    lines = ["".join([" " * width, *(f"{title:>{w}}" for title, w in zip(columns, widths, strict=True))])]
    for name, values in rows.items():
        cells = (f"{value:{w}.2f}" for value, w in zip(values, widths, strict=True))
        lines.append("".join([f"{name:{width}}", *cells]))
    if pseudo_labels:
        lines.append(f"unlabelled images: {pseudo_labels['seen']:,} seen, {pseudo_labels['kept']:,} kept")
        lines += [pseudo_labels["fault"]] if pseudo_labels["fault"] else []
    return "\n".join(lines)


def save_images(path: Path, columns: Sequence[tuple[str, Tensor]]) -> None:
    """Draw columns of images side by side into one PNG, each under its title.

    Args:
        path: The file.
        columns: Title and images of each, ``(rows, c, h, w)``, uint8; of four channels, the colours are drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = len(columns[0][1])
    figure, axes = plt.subplots(rows, len(columns), figsize=(1.6 * len(columns), 1.6 * rows + 0.3), squeeze=False)
    for column, (title, images) in enumerate(columns):
        axes[0, column].set_title(title)
        for axis, image in zip(axes[:, column], images, strict=True):
            axis.imshow(image[:3].expand(3, -1, -1).permute(1, 2, 0).numpy())
            axis.set_axis_off()
    figure.tight_layout(pad=0.3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)


def save_curves(path: Path, records: Sequence[dict[str, Any]], panels: Sequence[Panel], title: str) -> None:
    """Draw the panels side by side, over updates, into one PNG; a panel without values is left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # a run resumed at its end in a new folder has nothing to draw
    panels = [p for p in panels if any(key in r for r in records for key in p.keys)] or panels[:1]
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.0), squeeze=False)
    for axis, (panel_title, keys, scale) in zip(axes[0], panels, strict=True):
        for key in keys:
            points = [(r["update"], r[key]) for r in records if r.get(key) is not None and math.isfinite(r[key])]
            if points:
                axis.plot(
                    *zip(*points, strict=True), label=key.replace("_", " "), marker="." if len(points) < 30 else ""
                )
        axis.set_title(panel_title)
        axis.set_xlabel("update")
        if scale == "symlog":
            axis.set_yscale("symlog", linthresh=1e-3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.tight_layout()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)
