"""The curve of a training run: kept in memory, written as CSV, read back to go on."""

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np

from sigjax.models.config import InputError
from sigjax.models.outputs import written
from sigjax.models.train import StepRecord

COLUMNS = (*StepRecord._fields, "held_out_loss")


@dataclass
class History:
    """What happened in a run, step by step.

    Attributes:
        steps: one record a step.
        held_out: (step, held-out loss) of each evaluation.
    """

    steps: list[StepRecord] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Columns of steps, each [steps]; "evaluated" and "held_out_loss", each [evaluations]."""
        columns = {
            name: np.array([record[i] for record in self.steps])
            for i, name in enumerate(StepRecord._fields)
        }
        evaluated = np.array([step for step, _ in self.held_out], np.int64)
        return columns | {
            "evaluated": evaluated,
            "held_out_loss": np.array([loss for _, loss in self.held_out]),
        }

    def write(self, path: Path) -> None:
        """Writes the columns COLUMNS; a cell is empty where nothing was measured."""
        steps = {record.step: record for record in self.steps}
        held_out = dict(self.held_out)
        blank = ("",) * (len(StepRecord._fields) - 1)
        with written(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(COLUMNS)
            for step in sorted(steps.keys() | held_out.keys()):
                rows.writerow((*steps.get(step, (step, *blank)), held_out.get(step, "")))

    @classmethod
    def read(cls, path: Path, until: int) -> Self:
        """The part of a written history up to step until.

        Raises:
            InputError: the file is missing or not a history.
        """
        history = cls()
        try:
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    history._take(row, until)
        except (KeyError, OSError, TypeError, ValueError) as error:
            msg = f"{path}: not a readable history of a run ({type(error).__name__}: {error})"
            raise InputError(msg) from error
        return history

    def _take(self, row: dict[str, str], until: int) -> None:
        step = int(row["step"])
        if step > until:
            return
        if row["loss"]:
            loss, rate, norm = (
                float(row[name]) for name in ("loss", "learning_rate", "gradient_norm")
            )
            cells, seconds, waited = int(row["cells"]), float(row["seconds"]), float(row["waited"])
            self.steps.append(StepRecord(step, loss, rate, norm, cells, seconds, waited))
        if row["held_out_loss"]:
            self.held_out.append((step, float(row["held_out_loss"])))
