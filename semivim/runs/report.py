"""The report at the end of a run: a table, a picture and metrics.json."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from semivim.runs.run_log import RunLog
from semivim.utils.files import atomic_path, write_text


def write_report(folder: Path, results: dict[str, Any], metric: str, log: RunLog, title: str) -> None:
    """Write metrics.json and curves.png into the run folder and print the table.

    Args:
        folder: Run folder.
        results: What metrics.json gets; ``student``, ``teacher`` and ``best`` are shown.
        metric: Name of the metric that chose the best teacher.
        log: Log of the run.
        title: Title of the picture.
    """
    write_text(folder / "metrics.json", json.dumps(results, indent=1))
    save_curves(folder / "curves.png", log.records, title)
    log.say(results_table(results["student"], results["teacher"]))
    log.say(f"teacher {metric} {results['teacher'][metric]:.2f} (last), {results['best'][metric]:.2f} (best)")
    log.say(f"{folder}: model.safetensors (best teacher), metrics.json, curves.png")


def results_table(student: dict[str, Any], teacher: dict[str, Any]) -> str:
    """Student and teacher side by side, in percent."""
    names = ["top1", "top5", "balanced_acc", "many", "medium", "few", "worst_class_recall"]
    lines = [f"{'':22}{'student':>10}{'teacher':>10}"]
    for name in names:
        if name in teacher:
            lines.append(f"{name:22}{student[name]:10.2f}{teacher[name]:10.2f}")
    for c, recall in enumerate(teacher["per_class_recall"]):
        if len(teacher["per_class_recall"]) <= 20 and recall is not None:
            lines.append(f"{f'recall of class {c}':22}{student['per_class_recall'][c]:10.2f}{recall:10.2f}")
    return "\n".join(lines)


def save_curves(path: Path, records: Sequence[dict[str, Any]], title: str) -> None:
    """Draw loss, accuracy, kept share, alpha and V over updates into one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        ("loss", ["loss_labelled", "loss_unlabelled"], "linear"),
        ("top-1 (%)", ["student_top1", "teacher_top1"], "linear"),
        ("pseudo-labels", ["kept_share", "pseudo_accuracy"], "linear"),
        ("alpha", ["alpha"], "linear"),
        ("V and guard rate", ["v", "guard_rate"], "symlog"),
    ]
    # a run resumed at its end in a new folder has nothing to draw
    panels = [p for p in panels if any(key in r for r in records for key in p[1])] or panels[:1]
    figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels), 3.0), squeeze=False)
    for axis, (name, keys, scale) in zip(axes[0], panels, strict=True):
        for key in keys:
            points = [(r["update"], r[key]) for r in records if r.get(key) is not None and math.isfinite(r[key])]
            if points:
                axis.plot(
                    *zip(*points, strict=True), label=key.replace("_", " "), marker="." if len(points) < 30 else ""
                )
        axis.set_title(name)
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
