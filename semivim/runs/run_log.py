"""Progress of a run on the terminal and in its log files."""

import csv
import json
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.utils import trim_summary, update_summary
from tqdm import tqdm

from semivim.runs.run_folder import RECORDS, SUMMARY
from semivim.utils.files import atomic_path
from semivim.utils.terminal import escape_lines
from semivim.utils.user_error import UserError, one_line, short

FIRST_LINE_S = 10.0  # until a line says how far a run is that has logged no figures yet
# Without a bar that shrinks to one character beside the figures.
_BAR = "{percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{remaining} left{postfix}]"
_BAR_COLUMNS = 45  # of all but the figures, with six digits for each number of updates


def fitting(words: Sequence[str], columns: int) -> str:
    """As many of the words, without repetitions, as fit into so many columns."""
    text = ""
    for word in dict.fromkeys(words):
        longer = f"{text} {word}".lstrip()
        if len(longer) > columns:
            break
        text = longer
    return text


def _postfix_columns() -> int:
    return shutil.get_terminal_size().columns - _BAR_COLUMNS


class RunLog:
    """Progress on the terminal; ``metrics.jsonl`` and ``summary.csv`` in the run folder.

    Args:
        folder: Run folder; None writes and prints nothing (ranks other than 0).
        total_updates: Updates of the whole run.
        first_update: Update the run starts or resumes at; records of later updates are dropped from the log.
        first_epoch: Epoch the run starts or resumes at; records and rows of it and later ones are dropped too.
        train_columns: Names of an epoch's means in ``summary.csv``.
        eval_columns: Names of its metrics there.
        log_wandb: Send the rows to Weights & Biases too.
    """

    def __init__(
        self,
        folder: Path | None,
        total_updates: int,
        first_update: int = 0,
        first_epoch: int = 0,
        *,
        train_columns: Sequence[str] = (),
        eval_columns: Sequence[str] = (),
        log_wandb: bool = False,
    ) -> None:
        self.path = folder / RECORDS if folder else None
        self.train_columns, self.eval_columns, self.log_wandb = train_columns, eval_columns, log_wandb
        self.total, self.first, self.done = total_updates, first_update, first_update
        self.images = 0  # since the last record
        self.said: set[str] = set()  # of lines that are printed once
        self.records: list[dict[str, Any]] = []
        self.start_s = self.mark_s = time.perf_counter()
        self.bar = None
        if self.path:
            found = read_jsonl(self.path)
            self.records = [r for r in found if r["update"] <= first_update and r.get("epoch", -1) < first_epoch]
            with atomic_path(self.path) as temporary:
                temporary.write_text("".join(json.dumps(r) + "\n" for r in self.records), encoding="utf-8")
            _trim_summary(self.path.with_name(SUMMARY), first_epoch)
            self.say("loading the first batch")
            self.first_line = threading.Timer(FIRST_LINE_S, self._say_how_far)
            self.first_line.daemon = True
            self.first_line.start()
            if sys.stderr.isatty():
                self.bar = tqdm(total=total_updates, initial=first_update, dynamic_ncols=True, bar_format=_BAR)

    def step(self, num_images: int) -> None:
        """Count one update that trained on ``num_images`` images."""
        self.done += 1
        self.images += num_images
        if self.bar:
            self.bar.update()

    def record(self, values: dict[str, Any]) -> None:
        """Append values of an interval to the log and show them."""
        if not self.path:
            return
        self.first_line.cancel()
        now_s = time.perf_counter()
        if self.images:
            values = {"images_per_s": self.images / (now_s - self.mark_s), **values}
        self.images, self.mark_s = 0, now_s
        values = {"update": self.done, **values}
        self.records.append(values)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        figures = {key: f"{key} {value:.4g}" for key, value in values.items() if isinstance(value, float)}
        text = " ".join(figures.values())
        if self.bar and "epoch" not in values:
            first = [figures[key] for key in self.train_columns if key in figures]
            self.bar.set_postfix_str(fitting([*first, *figures.values()], _postfix_columns()))
        else:
            eta_s = (now_s - self.start_s) / max(1, self.done - self.first) * (self.total - self.done)
            self.say(f"[{self.done}/{self.total} eta {eta_s:.0f}s] {text}")

    def epoch(self, epoch: int, means: Mapping[str, Any], metrics: Mapping[str, Any], lr: float) -> None:
        """Write the row of an epoch.

        Args:
            epoch: The epoch that ends.
            means: Figures of its steps.
            metrics: Metrics at its end, {} if it was not evaluated.
            lr: Learning rate of the next step.
        """
        if not self.path:
            return
        train_row = {name: means.get(name) for name in self.train_columns}
        eval_row = {name: metrics.get(name) for name in self.eval_columns}
        update_summary(epoch, train_row, eval_row, self.path.with_name(SUMMARY), lr=lr, log_wandb=self.log_wandb)

    def _say_how_far(self) -> None:
        done = self.done - self.first
        self.say(f"[{self.done}/{self.total}] {done} updates in the first {FIRST_LINE_S:g} s")

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        if self.path:
            tqdm.write(escape_lines(text), file=sys.stdout)
            sys.stdout.flush()

    def say_once(self, text: str | None) -> None:
        """Print a line, if there is one, unless this log has printed it."""
        if text and text not in self.said:
            self.said.add(text)
            self.say(text)

    def close(self) -> None:
        """End the bar."""
        if self.path:
            self.first_line.cancel()
        if self.bar:
            self.bar.close()


def _trim_summary(path: Path, first_epoch: int) -> None:
    try:
        trim_summary(path, first_epoch)
    except (ValueError, OverflowError, csv.Error) as error:  # of a row without an epoch, or of bytes that are no text
        raise UserError(f"{path} is damaged: {one_line(error)}; move it away to go on") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file, [] where there is none; a last line cut short by a kill is dropped.

    Raises:
        UserError: If another line is damaged, or is no record of an update.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number} is damaged: {one_line(error)}; move it away to go on") from error
        if not isinstance(record, dict) or type(record.get("update")) is not int:
            raise UserError(f"{path}, line {number} is no record of an update: {short(record)}; move it away to go on")
        records.append(record)
    return records
