"""One run of the benchmark: check every contender, then measure cell by cell."""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import gate
from benchmarks.clocks import Probe
from benchmarks.jax_contenders import OWN, Inputs, JaxContender, make_inputs
from benchmarks.measure import alone, interleave
from benchmarks.options import Options
from benchmarks.report import Progress, cell_line
from benchmarks.rows import CSV_NAME, Provenance, Row, merge, summarise, write_csv
from benchmarks.torch_contender import TorchContender
from sigjax.testing import Direction, Workload

type AnyContender = JaxContender | TorchContender


@dataclass
class Run:
    """One run of the benchmark and what has come of it so far."""

    options: Options
    contenders: tuple[AnyContender, ...]
    probe: Probe
    provenance: Provenance
    folder: Path
    old_rows: list[Row]
    progress: Progress
    deadline: float
    rows: list[Row] = field(default_factory=list)
    unmeasured: list[str] = field(default_factory=list)
    refused: dict[tuple[str, Workload], str] = field(default_factory=dict)
    checked: set[Workload] = field(default_factory=set)
    gate_failed: bool = False
    longest_cell_s: float = 0.0

    def check(self, workload: Workload) -> None:
        """Compiles what runs in this process and judges what is ours; once a workload."""
        if workload in self.checked:
            return
        self.checked.add(workload)
        inputs = make_inputs(workload)
        for contender in self.contenders:
            if reason := contender.refusal(workload):
                self._refuse(contender, workload, reason)
            elif isinstance(contender, JaxContender):
                self._check_contender(contender, workload, inputs)

    def _check_contender(self, contender: JaxContender, workload: Workload, inputs: Inputs) -> None:
        own = contender.name in OWN
        try:
            with alone():  # the reference keeps the card busy
                verdicts = gate.judge(contender, inputs) if own else []
            for direction in self.options.directions:
                contender.prepare(workload, inputs, direction)
        # Out of memory, not supported, not compiled: the other contenders can still be measured.
        except RuntimeError as error:
            self._refuse(contender, workload, brief(error))
            self.gate_failed |= own
            return
        finally:
            contender.release()
        for verdict in verdicts:
            if not verdict.passed:
                self._refuse(contender, workload, f"wrong {verdict}")
                self.gate_failed = True
        if verdicts:
            worst = max(verdicts, key=lambda verdict: verdict.error / verdict.bound)
            self.progress.say(f"gate: {contender.name}, {workload.label}: {worst}")

    def _refuse(self, contender: AnyContender, workload: Workload, reason: str) -> None:
        self.refused[contender.name, workload] = reason
        self.unmeasured.append(f"{contender.name}, {workload.label}: {reason}")

    def measure(self) -> None:
        """Measures every cell that the time budget has room for; checks come first."""
        for workload in self.options.workloads:
            if time.monotonic() < self.deadline:
                self.check(workload)
            ready = [c for c in self.contenders if (c.name, workload) not in self.refused]
            inputs = make_inputs(workload)
            for direction in self.options.directions:
                cell = f"{workload.label} {direction}"
                self.progress.working_on(cell)
                started = time.monotonic()
                needed = max(self.options.plan.seconds(len(ready)), self.longest_cell_s)
                if not ready:
                    self.progress.finished(f"{cell}: no contender")
                elif started + needed > self.deadline:
                    self.unmeasured.append(f"{cell}: the time budget is spent")
                    self.progress.finished(f"{cell}: not started, the time budget is spent")
                else:
                    self._measure_cell(workload, inputs, direction, ready)
                    # Tuning and repeated rounds make a cell longer than its plan.
                    self.longest_cell_s = max(self.longest_cell_s, time.monotonic() - started)

    def _measure_cell(
        self,
        workload: Workload,
        inputs: Inputs,
        direction: Direction,
        ready: Sequence[AnyContender],
    ) -> None:
        cell = f"{workload.label} {direction}"
        prepared: list[AnyContender] = []
        try:
            for contender in ready:
                if self._prepare(contender, workload, inputs, direction):
                    prepared.append(contender)
            if not prepared:
                self.progress.finished(f"{cell}: no contender")
                return
            measurement = interleave(prepared, self.options.plan, self.probe)
        except RuntimeError as error:
            self.unmeasured.append(f"{cell}: {brief(error)}")
            self.progress.finished(f"{cell}: not measured, {brief(error)}")
            return
        finally:
            for contender in prepared:
                with contextlib.suppress(RuntimeError):  # a worker that has ended says so above
                    contender.release()
        if not measurement.rounds:
            self.unmeasured.append(f"{cell}: every round was under thermal slowdown")
            self.progress.finished(f"{cell}: not measured, the card is too hot")
            return
        rows = summarise(workload, direction, measurement, self.provenance)
        self.rows += rows
        write_csv(self.folder / CSV_NAME, merge(self.old_rows, self.rows))
        self.progress.finished(cell_line(rows))
        if rows[0].rounds < self.options.plan.rounds:
            self.progress.say(f"{cell}: retries ran out under thermal slowdown")

    def _prepare(
        self,
        contender: AnyContender,
        workload: Workload,
        inputs: Inputs,
        direction: Direction,
    ) -> bool:
        try:
            contender.prepare(workload, inputs, direction)
        except RuntimeError as error:
            self.unmeasured.append(
                f"{contender.name}, {workload.label} {direction}: {brief(error)}"
            )
            return False
        return True


def brief(error: Exception) -> str:
    """The first line of an error, at most 300 characters: XLA's run to pages."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
