"""Tables and figure of what rare_classes.py measured.

    python benchmarks/rare_classes_report.py

It prints an overview, a comparison of models and all figures of each condition as Markdown, and draws the figure.
"Prior removed" is `--posthoc-debias`; the overview has that of the mean prediction on unlabelled images.
"""

import argparse
import statistics
from collections import defaultdict
from pathlib import Path

from rare_classes import BLOCKS, HERE, METHODS, METRICS, SHORT, read_rows

BASELINE, REFERENCE = "supervised", "EMA teacher"
OVERVIEWS = {  # title -> block -> column
    "Unlabelled images distributed as the labelled ones": {
        "20-50": "20:1, 50 to 2 labels a class",
        "20-200": "20:1, 200 to 10",
        "100-100": "100:1, 100 to 1",
        "100-200": "100:1, 200 to 2",
        "openclipart": "openclipart",
        "openclipart-longer": "openclipart, 2,000 updates a stage",
    },
    "Unlabelled images in reversed order": {
        "20-50-reversed": "20:1, 50 to 2 labels a class",
        "20-200-reversed": "20:1, 200 to 10",
        "100-100-reversed": "100:1, 100 to 1",
        "100-200-reversed": "100:1, 200 to 2",
    },
}
MODELS = ("20-50", "20-50-vit", "20-50-resnet")  # blocks of the comparison of models

Results = dict[tuple[str, str, str], dict[int, dict[str, str]]]  # (method, who, posthoc) -> fold -> row


def mean_sd(values: list[float]) -> str:
    """Mean and standard deviation over the folds."""
    return f"{statistics.mean(values):.1f}" + (f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def by_condition(rows: list[dict[str, str]]) -> dict[tuple[str, str], Results]:
    """Rows of each condition and model."""
    grouped: dict[tuple[str, str], Results] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        results = grouped[row["condition"], row["model"]]
        results[row["method"], row["who"], row["posthoc"]][int(row["fold"])] = row
    return grouped


def by_fold(results: Results, method: str, metric: str, posthoc: str, who: str = "teacher") -> dict[int, float]:
    """A metric of a method in each fold."""
    return {fold: float(row[metric]) for fold, row in results.get((method, who, posthoc), {}).items()}


def paired(results: Results, method: str, posthoc: str, other: str, metric: str) -> list[float]:
    """How much better a method is than another without a prior removed, in each fold that both have."""
    mine, theirs = by_fold(results, method, metric, posthoc), by_fold(results, other, metric, "none")
    return [mine[fold] - theirs[fold] for fold in mine if fold in theirs]


def markdown(lines: list[list[str]]) -> str:
    """Rows of cells, the first one the head."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def overview(grouped: dict[tuple[str, str], Results], titles: dict[str, str]) -> str:
    """Balanced accuracy, in brackets that of the few-label classes: of the baseline, then differences to it."""
    columns = {title: grouped.get((BLOCKS[block][0].name, "vim"), {}) for block, title in titles.items()}
    lines = [["method", "prior removed", *columns]]
    for method in METHODS:
        for posthoc in ("none",) if "tau" in METHODS[method] else ("none", "unlabeled"):
            cells = []
            for results in columns.values():
                few = paired(results, method, posthoc, BASELINE, "few")
                cell = ""
                if (method, posthoc) == (BASELINE, "none") and few:
                    means = (by_fold(results, method, m, posthoc).values() for m in ("balanced_acc", "few"))
                    cell = "{:.1f} ({:.1f})".format(*map(statistics.mean, means))
                elif few:
                    difference = mean_sd(paired(results, method, posthoc, BASELINE, "balanced_acc"))
                    cell = f"{difference} ({statistics.mean(few):+.1f})"
                cells.append(cell)
            if any(cells):
                lines.append([method, "yes" if posthoc != "none" else "", *cells])
    return markdown(lines)


def models(grouped: dict[tuple[str, str], Results]) -> str:
    """Balanced accuracy, in brackets that of the few-label classes, of three models of equal time for a step."""
    columns = {BLOCKS[block][1]: grouped.get((BLOCKS[block][0].name, BLOCKS[block][1]), {}) for block in MODELS}
    lines = [["method", "prior removed", *columns]]
    for method in SHORT:
        for posthoc in ("none",) if "tau" in METHODS[method] else ("none", "unlabeled"):
            cells = []
            for results in columns.values():
                found = [list(by_fold(results, method, m, posthoc).values()) for m in ("balanced_acc", "few")]
                cells.append(f"{mean_sd(found[0])} ({statistics.mean(found[1]):.1f})" if found[0] else "")
            lines.append([method, "yes" if posthoc != "none" else "", *cells])
    return markdown(lines)


def table(results: Results) -> str:
    """One line a method and form of its teacher, plain or with a prior removed (D3); differences of the same folds."""

    def values(method: str, metric: str, posthoc: str, who: str = "teacher") -> list[float]:
        return list(by_fold(results, method, metric, posthoc, who).values())

    def minus(method: str, posthoc: str, other: str, metric: str = "balanced_acc") -> str:
        differences = paired(results, method, posthoc, other, metric)
        return mean_sd(differences) if differences and (method, posthoc) != (other, "none") else ""

    head = ["method", "prior removed", "folds", "balanced acc.", "minus supervised", "minus EMA", "many / medium / few"]
    head += ["few minus supervised", "worst class", "G-mean", "ECE", "student"]
    lines = [head]
    for method in METHODS:
        # Training with the labels' prior and removing it again counts it twice.
        for posthoc in ("none", "unlabeled") if "tau" in METHODS[method] else ("none", "labeled", "unlabeled"):
            if not (folds := values(method, "top1", posthoc)):
                continue
            cells = [mean_sd(values(method, name, posthoc)) for name in METRICS]
            by_name = dict(zip(METRICS, cells, strict=True))
            lines.append(
                [
                    method, posthoc, str(len(folds)), by_name["balanced_acc"], minus(method, posthoc, BASELINE),
                    minus(method, posthoc, REFERENCE),
                    " / ".join(by_name[name].split(" ")[0] for name in ("many", "medium", "few")),
                    minus(method, posthoc, BASELINE, "few"), by_name["worst_class_recall"], by_name["geometric_mean"],
                    by_name["calibration_error"],
                    mean_sd(values(method, "balanced_acc", posthoc, "student")),
                ]
            )  # fmt: skip
    return markdown(lines)


def draw(grouped: dict[tuple[str, str], Results], path: Path) -> None:
    """Draw balanced accuracy and recall of the few-label classes of every method, a point a fold."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [BLOCKS[block][0].name for titles in OVERVIEWS.values() for block in titles]
    shown = [(name, grouped[name, "vim"]) for name in names if (name, "vim") in grouped]
    methods = [name for name in METHODS if any((name, "teacher", "none") in results for _, results in shown)]
    rows, columns = -(-len(shown) // 4), 4
    size = 4.2 * columns, 3.4 * rows
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=True, layout="constrained")
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, (condition, results) in zip(axes.flat, shown, strict=False):
        for metric, posthoc, colour, offset in (
            ("balanced_acc", "none", "C0", -0.18),
            ("balanced_acc", "unlabeled", "C1", 0.0),
            ("few", "none", "C2", 0.18),
        ):
            for place, method in enumerate(methods):
                folds = results.get((method, "teacher", posthoc), {})
                points = [float(row[metric]) for row in folds.values()]
                label = {"few": "few-label classes", "none": "balanced accuracy"}.get(
                    metric if metric == "few" else posthoc, "balanced accuracy, prior removed (D3)"
                )
                axis.plot(points, [place + offset] * len(points), "o", color=colour, markersize=4,
                          label=label if place == 0 else None)  # fmt: skip
        axis.set_yticks(range(len(methods)), methods, fontsize=7)
        axis.set_title(condition.replace(", ", ",\n", 1), fontsize=8)
        axis.grid(alpha=0.3)
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=7)
    figure.supxlabel("teacher, %", fontsize=9)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=HERE / "results" / "rare_classes.csv")
    parser.add_argument("--figure", type=Path, default=HERE / "figures" / "rare_classes.png")
    args = parser.parse_args()
    if not (rows := read_rows(args.csv)):
        parser.error(f"{args.csv} holds no run: benchmarks/rare_classes.py writes it")
    grouped = by_condition(rows)
    print(f"Balanced accuracy (of the few-label classes) of {BASELINE} training, then differences to it, %\n")
    for title, titles in OVERVIEWS.items():
        print(f"{title}:\n\n{overview(grouped, titles)}\n")
    print("\nModels of equal time for a step, balanced accuracy (of the few-label classes), %\n")
    print(models(grouped))
    for (condition, model), results in grouped.items():
        seconds = statistics.mean(float(row["seconds"]) for folds in results.values() for row in folds.values())
        print(f"\n{condition}; {model}; mean over the folds +- standard deviation, %; {seconds:.0f} s a run\n")
        print(table(results))
    draw(grouped, args.figure)


if __name__ == "__main__":
    main()
