"""The Hopper kernels under NVIDIA's compute-sanitizer: memory errors, and races in shared memory.

    python -m benchmarks.sanitize --sanitizer /usr/local/cuda/bin/compute-sanitizer

Each case is a forward and a backward of unequal lengths in a process of its own. Between the
warpgroups of a kernel stand barriers in shared memory (mbarriers), and racecheck reports what they
order: the word by which Triton lets warpgroups start and end, and the number of the next tile that
hopper_queue hands over. The first case is a kernel that hands numbers over and does nothing else.
What racecheck reports there, at the kernel's own line and in hopper_queue, it may report of the
others; a report that names any other line is a failure, and so is any of memcheck.
"""

import argparse
import inspect
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTROL = "control"
CASES = (CONTROL, "H64", "H128")
TOOLS = ("memcheck", "racecheck")
RAN = "ran"  # what a case says once its kernels are through
_PLACE = re.compile(r"\bat \w+\S* in (\S+):(\d+)")
_SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")

type Place = tuple[str, str]  # a file's name and a line of it


@dataclass(frozen=True)
class Report:
    """What one tool said of one case.

    Attributes:
        found: errors or hazards that the tool counts; None where it did not come to its summary.
        known: of these, those whose places the control has too.
        places: of the others, FILE:LINE; or why there is no summary.
    """

    found: int | None
    known: int
    places: tuple[str, ...]

    @property
    def is_clean(self) -> bool:
        """Whether nothing was found but what the control has too."""
        return self.found is not None and self.found == self.known


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 where every case is clean under every tool."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sanitizer", default="compute-sanitizer", help="the program")
    parser.add_argument("--seconds", type=float, default=120, help="that one case may take")
    parser.add_argument("--out", type=Path, help="folder for what the tools say, whole")
    options = parser.parse_args(arguments)
    if shutil.which(options.sanitizer) is None:
        parser.error(f"--sanitizer must be a program, got {options.sanitizer!r}")
    failed = 0
    known: dict[str, frozenset[Place]] = dict.fromkeys(TOOLS, frozenset())
    known["racecheck"] = control_places()
    for case in CASES:
        for tool in TOOLS:
            result, said = check(options.sanitizer, tool, case, options.seconds, known[tool])
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
                (options.out / f"sanitize_{case}_{tool}.txt").write_text(said)
            failed += not result.is_clean
            print(f"{case} {tool}: {describe(result)}", flush=True)
            if case == CONTROL:
                known[tool] = as_known(places_of(said) & known[tool])
    return int(failed > 0)


def check(
    sanitizer: str, tool: str, case: str, seconds: float, known: frozenset[Place]
) -> tuple[Report, str]:
    """What one tool said of one case: read, and as it said it."""
    process = [sys.executable, "-m", "benchmarks.sanitize_case", case, tool]
    command = [sanitizer, "--tool", tool, *process]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return Report(None, 0, (f"hung for {seconds:g} s",)), ""
    if RAN not in done.stdout.split():
        said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        return Report(None, 0, (f"crashed ({done.returncode}): {said[-1]}",)), done.stdout
    return parse(done.stdout, known), done.stdout


def parse(text: str, known: frozenset[Place]) -> Report:
    """The tool's output; known are places of which the control is reported too."""
    summary = _SUMMARY.search(text)
    found = int(next(filter(None, summary.groups()))) if summary else None
    count, places = 0, []
    for block in re.split(r"^=+ Error: |^=+ Invalid ", text, flags=re.MULTILINE)[1:]:
        at = _places(block)
        if at and known.issuperset(at):
            count += 1
        else:
            places.append(", ".join(f"{file}:{line}" for file, line in at) or block.splitlines()[0])
    return Report(found, count, tuple(places))


def describe(report: Report) -> str:
    """One line."""
    if report.found is None:
        return "; ".join(report.places) or "no summary"
    rest = f", {report.known} where the control has them" if report.known else ""
    if report.is_clean:
        return f"clean{rest}"
    return f"{report.found} found{rest}: {'; '.join(report.places)}"


def places_of(text: str) -> frozenset[Place]:
    """All places that a tool's output names."""
    return frozenset(_places(text))


def _places(text: str) -> list[Place]:
    return [(Path(file).name, line) for file, line in _PLACE.findall(text)]


def control_places() -> frozenset[Place]:
    """Where racecheck may report the control: its own line, and the lines of ask and hear."""
    from benchmarks.sanitize_case import control_kernel
    from sigjax.kernels.hopper_queue import ask, hear

    places = {own_line(control_kernel)}
    for function in (ask, hear):
        source, first = inspect.getsourcelines(function.fn)
        file = Path(function.fn.__code__.co_filename).name
        places |= {(file, str(first + i)) for i in range(len(source))}
    return frozenset(places)


def as_known(found: frozenset[Place]) -> frozenset[Place]:
    """Places of our kernels that go with those found in the control: of its own line, their own."""
    from benchmarks.sanitize_case import control_kernel
    from sigjax.kernels.hopper_backward import hopper_backward_kernel
    from sigjax.kernels.hopper_forward import hopper_forward_kernel

    if own_line(control_kernel) not in found:
        return found
    return found | {own_line(hopper_forward_kernel), own_line(hopper_backward_kernel)}


def own_line(kernel: Any) -> Place:
    """Where a kernel begins: what Triton adds to it is there."""
    code = kernel.fn.__code__
    # A function's first line is that of its decorator.
    return Path(code.co_filename).name, str(code.co_firstlineno + 1)


if __name__ == "__main__":
    sys.exit(main())
