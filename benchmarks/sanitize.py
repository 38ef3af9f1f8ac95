"""The Hopper kernels under NVIDIA's compute-sanitizer: memory errors, and races in shared memory.

    python -m benchmarks.sanitize --sanitizer /usr/local/cuda/bin/compute-sanitizer

Each case is a forward and a backward of unequal lengths in a process of its own. Triton lets the
warpgroups of a specialised kernel start and end through a word in shared memory, between barriers
that racecheck does not follow: it reports that word as a race in every such kernel. The first case
is such a kernel in which nothing else is shared. Reports at a kernel's own line are Triton's; any
at another line, of what our code shares, is a failure.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CONTROL = "control"
CASES = (CONTROL, "H64", "H128")
TOOLS = ("memcheck", "racecheck")
RAN = "ran"  # what a case says once its kernels are through
_PLACE = re.compile(r"\bat \w+\S* in (\S+):(\d+)")
_SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")


@dataclass(frozen=True)
class Report:
    """What one tool said of one case.

    Attributes:
        found: errors or hazards that the tool counts; None where it did not come to its summary.
        dispatch: of these, those at a kernel's own line alone.
        places: of the others, FILE:LINE; or why there is no summary.
    """

    found: int | None
    dispatch: int
    places: tuple[str, ...]

    @property
    def is_clean(self) -> bool:
        """Whether nothing was found but Triton's own."""
        return self.found is not None and self.found == self.dispatch


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
    # Only what Triton does to the control too is Triton's.
    own = {tool: own_lines() for tool in TOOLS}
    for case in CASES:
        for tool in TOOLS:
            result, said = check(options.sanitizer, tool, case, options.seconds, own[tool])
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
                (options.out / f"sanitize_{case}_{tool}.txt").write_text(said)
            failed += not result.is_clean
            if case == CONTROL and not (result.is_clean and result.dispatch):
                own[tool] = frozenset()
            print(f"{case} {tool}: {describe(result)}", flush=True)
    return int(failed > 0)


def check(
    sanitizer: str, tool: str, case: str, seconds: float, own: frozenset[tuple[str, str]]
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
    return parse(done.stdout, own), done.stdout


def parse(text: str, own: frozenset[tuple[str, str]]) -> Report:
    """The tool's output; own are the (file name, line) of kernels."""
    summary = _SUMMARY.search(text)
    found = int(next(filter(None, summary.groups()))) if summary else None
    dispatch, places = 0, []
    for block in re.split(r"^=+ Error: |^=+ Invalid ", text, flags=re.MULTILINE)[1:]:
        at = [(Path(file).name, line) for file, line in _PLACE.findall(block)]
        if at and all(place in own for place in at):
            dispatch += 1
        else:
            places.append(", ".join(f"{file}:{line}" for file, line in at) or block.splitlines()[0])
    return Report(found, dispatch, tuple(places))


def describe(report: Report) -> str:
    """One line."""
    if report.found is None:
        return "; ".join(report.places) or "no summary"
    rest = f", {report.dispatch} of Triton's dispatch" if report.dispatch else ""
    if report.is_clean:
        return f"clean{rest}"
    return f"{report.found} found{rest}: {'; '.join(report.places)}"


def own_lines() -> frozenset[tuple[str, str]]:
    """(file name, line) where the kernels begin: what Triton adds to one is there."""
    from benchmarks.sanitize_case import control_kernel
    from sigjax.kernels.hopper_backward import hopper_backward_kernel
    from sigjax.kernels.hopper_forward import hopper_forward_kernel

    kernels = (control_kernel, hopper_forward_kernel, hopper_backward_kernel)
    codes = [kernel.fn.__code__ for kernel in kernels]
    # A function's first line is that of its decorator.
    return frozenset((Path(x.co_filename).name, str(x.co_firstlineno + 1)) for x in codes)


if __name__ == "__main__":
    sys.exit(main())
