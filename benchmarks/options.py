"""The command line of benchmarks.attention."""

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.jax_contenders import ATTENTIONS
from benchmarks.measure import Plan
from benchmarks.rows import TRITON_SIGMOID
from sigjax.testing import (
    DIRECTIONS,
    PAPER_HEAD_SIZES,
    PAPER_LENGTHS,
    PAPER_TOKENS,
    PAPER_WIDTH,
    WORKLOAD_NAMES,
    Direction,
    Workload,
    workload,
)

CONTENDERS = (*ATTENTIONS, TRITON_SIGMOID)
DEFAULT_CONTENDERS = {
    "gpu": ("sigjax", "jax_cudnn", "jax_xla", TRITON_SIGMOID),
    "cpu": ("sigjax_xla", "jax_xla"),
}


@dataclass(frozen=True)
class Options:
    """What to measure, how, and where results go; None is decided by the device."""

    workloads: tuple[Workload, ...]
    directions: tuple[Direction, ...]
    contenders: tuple[str, ...]
    plan: Plan
    device: Literal["gpu", "cpu"]
    out: Path | None
    time_budget_s: float | None
    triton_sigmoid_path: str | None
    worker_python: str
    prewarm: int
    commit: str | None


def parse(argv: Sequence[str], description: str) -> Options:
    """Reads a command line; ends the process with status 2 where it is wrong."""
    parser = _parser(description)
    given = parser.parse_args(argv)
    if shutil.which(given.worker_python) is None:
        parser.error(f"--worker-python must be an interpreter, got {given.worker_python!r}")
    contenders = given.contenders or DEFAULT_CONTENDERS[given.device]
    try:
        return Options(
            workloads=_workloads(given),
            directions=given.directions,
            contenders=contenders,
            plan=Plan(given.rounds, given.burst_ms, given.rest_s),
            device=given.device,
            out=given.out,
            time_budget_s=given.time_budget_s,
            triton_sigmoid_path=given.triton_sigmoid_path,
            worker_python=given.worker_python,
            prewarm=given.prewarm,
            commit=given.commit,
        )
    except ValueError as error:
        parser.error(str(error))


def _workloads(given: argparse.Namespace) -> tuple[Workload, ...]:
    def make(name: str, length: int, head_size: int) -> Workload:
        return workload(name, length, head_size, tokens=given.tokens, width=given.width)

    return tuple(
        make(name, length, head_size)
        for name in given.workloads
        for head_size in given.head_sizes
        for length in ((max(given.lengths),) if name == "ragged" else given.lengths)
    )


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(name: str, text: str, default: object, kind: Any = str, **more: Any) -> None:
        parser.add_argument(name, help=text, default=default, type=kind, **more)

    names = _list_of(WORKLOAD_NAMES)
    add("--workloads", f"of {names.__doc__}", WORKLOAD_NAMES, names)
    add("--head-sizes", "comma-separated", PAPER_HEAD_SIZES, _numbers)
    add("--lengths", "T; ragged takes the longest alone", PAPER_LENGTHS, _numbers)
    add("--directions", "forward,backward", DIRECTIONS, _list_of(DIRECTIONS))
    add("--contenders", f"of {','.join(CONTENDERS)}", None, _list_of(CONTENDERS))
    add("--tokens", "batch · length", PAPER_TOKENS, int)
    add("--width", "heads · head size", PAPER_WIDTH, int)
    add("--rounds", "rounds that count", Plan.rounds, int)
    add("--burst-ms", "device time of a burst, ms", Plan.burst_ms, float)
    add("--rest-s", "rest before a burst, seconds", Plan.rest_s, float)
    add("--device", "what to run on", "gpu", choices=("gpu", "cpu"))
    add("--out", "folder; default benchmarks/results/CARD", None, Path)
    add("--time-budget-s", "start no cell that would end later, seconds", None, float)
    add("--triton-sigmoid-path", "folder holding the package triton_sigmoid", None)
    add("--worker-python", "interpreter with torch for triton-sigmoid", sys.executable)
    add("--prewarm", "processes that compile triton-sigmoid's kernels first", 10, int)
    add("--commit", "commit to record where there is no git", None)
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        msg = f"expected whole numbers separated by commas, got {text!r}"
        raise argparse.ArgumentTypeError(msg) from None


def _list_of(choices: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def parse_list(text: str) -> tuple[str, ...]:
        parts = tuple(dict.fromkeys(text.split(",")))
        if unknown := [part for part in parts if part not in choices]:
            msg = f"expected some of {','.join(choices)}, got {','.join(unknown)}"
            raise argparse.ArgumentTypeError(msg)
        return parts

    parse_list.__doc__ = ",".join(choices)
    return parse_list
