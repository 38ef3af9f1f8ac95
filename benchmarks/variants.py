"""Speed and memory of the arguments that concern single pairs, on one NVIDIA GPU.

    python -m benchmarks.variants --out FOLDER

measures the portable kernels (implementation "triton", bf16), and the Hopper kernels of all
but vmap, and judges what is claimed:

- bias, mask, window and segments do at least 0.8 of the plain call's throughput per visited
  tile, forward and backward, at T = 4,096 with B * T = 16,384 and N * H = 2,048;
- local_window_size=256 at T = 16,384 is at least 12 times as fast as full attention;
- a vmapped call is within 3 % of the batched one;
- one row of 65,536 tokens and 16 heads of 64 takes inputs, outputs, gradients and one
  float32 query gradient, forward and backward together.

Visited tiles are counted from the tile table (variants_tiles.py). The backward pass of a bias is
measured with the bias's gradient, whose kernel's tiles count as well, and without. On the Hopper
kernels windows, segments and a bias have a peer: plain calls of rows as long as what a query sees,
or with logits as spread, to tell what the argument costs from what a short loop costs, or exact
weights.
Contenders take turns in bursts as in measure.py; a ratio is taken within each round.

Writes variants.csv (workload "hopper" is the Hopper kernels'), variants_memory.csv, variants.png
and variants_hopper.png. The exit status is 1 where a claim
does not hold or something was not measured. --only hopper (or "backward", "H=64", memory) measures
the cells with that in their label. --small runs tiny sizes on a CPU with "xla" and judges nothing.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
from triton.errors import TritonError

from benchmarks import provenance, variants_memory
from benchmarks.clocks import NoProbe, NvmlProbe, Probe
from benchmarks.measure import interleave
from benchmarks.report import Progress
from benchmarks.rows import Provenance
from benchmarks.run import brief
from benchmarks.variants_cases import (
    FULL,
    PLAIN,
    SMALL,
    Cell,
    Program,
    Suite,
    Variant,
    arguments,
    extras,
    operands,
    pair_shape,
    shape_of,
)
from benchmarks.variants_rows import (
    CSV_NAME,
    HOPPER_PICTURE_NAME,
    MemoryRow,
    VariantRow,
    cell_rows,
    plot,
    write_table,
)
from sigjax.choice import gpu_capability
from sigjax.kernels import hopper_choice
from sigjax.operands import Operands, Settings

MEMORY_CSV_NAME = "variants_memory.csv"
MEMORY = "memory"  # what --only calls it
MEMORY_SECONDS = 120.0
COMPILERS = 4  # threads; Triton and XLA let go of the interpreter lock
H100 = 90  # the tiles counted where there is no GPU


@dataclass(frozen=True)
class Options:
    """What the command line asks for; only is a part of the labels of what is measured."""

    out: Path
    time_budget_s: float
    commit: str | None
    small: bool
    only: str

    def wants(self, label: str) -> bool:
        """Whether what has this label is measured."""
        return self.only in label


@dataclass
class Run:
    """One run and what has come of it so far."""

    suite: Suite
    options: Options
    probe: Probe
    provenance: Provenance
    progress: Progress
    deadline: float
    rows: list[VariantRow] = field(default_factory=list)
    memory: MemoryRow | None = None
    problems: list[str] = field(default_factory=list)
    longest_compile_s: float = 0.0

    def measure_memory(self) -> None:
        """Measures the long row's memory; a process of its own, before this one needs the card."""
        left = min(MEMORY_SECONDS, self.deadline - time.monotonic())
        if left <= 0:
            self._not_measured(MEMORY, "the time budget is spent")
            return
        shape = self.suite.memory
        try:
            platforms = "cpu" if self.options.small else None
            found = variants_memory.measure(shape, self.suite.implementation, left, platforms)
        except variants_memory.MemoryProcessError as error:
            self._not_measured(MEMORY, str(error))
            return
        self.memory = MemoryRow(
            **asdict(self.provenance),
            T=shape.length,
            B=shape.batch,
            N=shape.heads,
            H=shape.head_size,
            dtype=shape.dtype,
            implementation=self.suite.implementation,
            allowed_bytes=variants_memory.allowed_bytes(shape),
            argument_bytes=found.argument,
            output_bytes=found.output,
            temp_bytes=found.temp,
            planned_bytes=found.planned,
            peak_bytes=found.peak,
        )
        write_table(self.options.out / MEMORY_CSV_NAME, [self.memory])
        self.progress.finished(self.memory.text)

    def measure_cell(self, cell: Cell) -> None:
        """Compiles and measures one cell, if the time budget has room for it."""
        self.progress.working_on(cell.label)
        started = time.monotonic()
        needed = self.suite.plan.seconds(len(cell.variants)) + self.longest_compile_s
        if started + needed > self.deadline:
            self._not_measured(cell.label, "the time budget is spent")
            return
        try:
            programs = self._compile(cell)
            self.longest_compile_s = max(self.longest_compile_s, time.monotonic() - started)
            if not any(program.name == PLAIN for program in programs):
                self._not_measured(cell.label, "the plain call is missing")
                return
            measurement = interleave(programs, self.suite.plan, self.probe)
        except RuntimeError as error:  # out of memory, a launch that failed
            self._not_measured(cell.label, brief(error))
            return
        if not measurement.rounds:
            self._not_measured(cell.label, "every round was under thermal slowdown")
            return
        capability = gpu_capability() or H100
        rows = cell_rows(cell, programs, measurement, self.provenance, capability)
        self.rows += rows
        write_table(self.options.out / CSV_NAME, self.rows)
        seconds = time.monotonic() - started
        self.progress.finished(f"{cell.label}: {len(rows)} contenders in {seconds:.1f} s")
        for row in rows:
            self.progress.say(row.text)
        if rows[0].rounds < self.suite.plan.rounds:
            self.progress.say(f"{cell.label}: retries ran out under thermal slowdown")

    def _compile(self, cell: Cell) -> list[Program]:
        if self.suite.implementation == "triton":
            _choose(cell)
        inputs = operands(cell.workload)
        made = extras(cell.variants, cell.workload)

        def compiled(variant: Variant) -> Program | str:
            given = arguments(variant, inputs, made)
            try:
                return Program(variant, cell, self.suite.implementation, given)
            # Not compiled, does not fit the card: the other variants can still be measured.
            except (RuntimeError, ValueError, TritonError) as error:
                return brief(error)

        with ThreadPoolExecutor(COMPILERS) as pool:
            results = list(pool.map(compiled, cell.variants))
        for variant, result in zip(cell.variants, results, strict=True):
            if isinstance(result, str):
                self.problems.append(f"not measured: {cell.label} {variant.name}: {result}")
        return [result for result in results if not isinstance(result, str)]

    def _not_measured(self, what: str, why: str) -> None:
        self.problems.append(f"not measured: {what}: {why}")
        self.progress.finished(f"{what}: not measured, {why}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 where a claim does not hold or something was not measured."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse(argv)
    started = time.monotonic()
    suite = SMALL if options.small else FULL
    probe = _device(suite, small=options.small)
    origin = provenance.collect(
        card=probe.card,
        driver=probe.driver,
        worker_versions={},
        argv=argv,
        commit=options.commit,
        module="benchmarks.variants",
    )
    cells = [cell for cell in suite.cells if options.wants(cell.label)]
    with_memory = options.wants(MEMORY)
    if not cells and not with_memory:
        labels = ", ".join((*(cell.label for cell in suite.cells), MEMORY))
        sys.stderr.write(f"--only must be part of one of {labels}; got {options.only!r}\n")
        return 2
    with Progress(len(cells) + with_memory) as progress:
        run = Run(
            suite,
            options,
            probe,
            origin,
            progress,
            started + options.time_budget_s,
        )
        if with_memory:
            run.measure_memory()
        for cell in cells:
            run.measure_cell(cell)
    return _conclude(run)


def parse(argv: Sequence[str]) -> Options:
    """Reads a command line; ends the process with status 2 where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.variants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument(
        "--time-budget-s", type=float, default=math.inf, help="start no cell that would end later"
    )
    parser.add_argument("--commit", help="commit to record where there is no git")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="cells with TEXT in their label; or memory"
    )
    parser.add_argument("--small", action="store_true", help='tiny sizes on a CPU, with "xla"')
    given = parser.parse_args(argv)
    if not given.time_budget_s >= 0:
        parser.error(f"--time-budget-s must not be negative, got {given.time_budget_s:g}")
    if given.out.exists() and not given.out.is_dir():
        parser.error(f"--out must be a folder, got the file {given.out.name}")
    return Options(given.out, given.time_budget_s, given.commit, given.small, given.only)


def _device(suite: Suite, *, small: bool) -> Probe:
    if small:
        jax.config.update("jax_platforms", "cpu")
        return NoProbe()
    # The process that measures memory needs its part of the card; read when the backend starts.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if jax.default_backend() != "gpu":
        msg = f"jax must see an NVIDIA GPU, got {jax.default_backend()}; or use --small"
        raise SystemExit(msg)
    for cell in suite.cells:
        _choose(cell)
    return NvmlProbe()


def _choose(cell: Cell) -> None:
    """Lets the cell's kernels, and no others, serve the calls that are traced from here on."""
    os.environ[hopper_choice.VARIABLE] = cell.directions
    jax.clear_caches()
    check_kernels(cell)


def check_kernels(cell: Cell) -> None:
    """Ends the process where other kernels than the cell's would serve one of its calls.

    Raises:
        SystemExit: so it is.
    """
    for variant in cell.variants:
        shape = shape_of(variant, cell.workload)
        size = (shape.batch, shape.length, shape.heads, shape.head_size)
        x = jax.ShapeDtypeStruct(size, shape.dtype)
        dtypes = {"bias": shape.dtype, "mask": "bool"}
        matrices: dict[str, Any] = {
            name: jax.ShapeDtypeStruct(pair_shape(axes, shape), dtype)
            for name, dtype in dtypes.items()
            if (axes := getattr(variant, name)) is not None
        }
        given = Operands(x, x, x, **matrices)  # pyrefly: ignore[bad-argument-type]
        served = hopper_choice.serves(cell.direction, given, Settings(scale=1.0))
        if served != (cell.kernels == "hopper"):
            found = "a Hopper" if served else "a portable"
            msg = f"{cell.label} must run on the {cell.kernels} kernels, got {found} kernel"
            raise SystemExit(msg)


def _conclude(run: Run) -> int:
    written = []
    if run.memory is not None:
        written.append(MEMORY_CSV_NAME)
    names = {shape.name for shape in run.suite.shapes}
    shown = [row for row in run.rows if row.workload in names]
    if run.rows:
        written.append(CSV_NAME)
    if shown:
        written.append(plot(shown, run.options.out).name)
    hopper = [row for row in run.rows if row.workload in {x.name for x in run.suite.hopper}]
    if hopper:
        written.append(plot(hopper, run.options.out, HOPPER_PICTURE_NAME).name)
    problems = list(run.problems)
    if run.suite.claims:
        judged: list[VariantRow | MemoryRow] = [*run.rows]
        if run.memory is not None:
            judged.append(run.memory)
        problems += [f"NOT met: {row.text}" for row in judged if row.met is False]
        # A time is of the counted tiles only where just their kernels ran.
        problems += [
            f"counted {row.kernels_counted} kernels, {row.kernels} ran: {row.text}"
            for row in run.rows
            if row.kernels != row.kernels_counted
        ]
    for name in written:
        print(f"written: {run.options.out / name}")
    for problem in problems:
        print(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
