"""Launches of random ragged shapes, thousands of them: none may hang, and samples are right.

    python -m benchmarks.soak --launches 10000 --batches 200 --processes 16

Every process draws shapes, compiles each once, and launches forward and backward with new lengths
every time; then batches of the same shapes are compared with the float64 oracle. A process
that says nothing for --seconds is ended and counts as hung: what it does on the CPU alone, the
oracle, does not run against that clock.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

REFERENCE = "reference"  # what a process says before it is on the CPU for long


@dataclass
class Outcome:
    """What became of one process.

    Attributes:
        launches: of random lengths, forward and backward.
        batches: compared with the oracle.
        problems: why it ended early, and what broke the tolerance rule.
    """

    launches: int = 0
    batches: int = 0
    problems: list[str] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 where nothing hung, crashed or was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--launches", type=int, default=10_000)
    parser.add_argument("--batches", type=int, default=200, help="compared with the oracle")
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60, help="of silence before one has hung")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--implementation", default="triton", choices=("triton", "xla"))
    options = parser.parse_args(arguments)
    count = options.processes
    for name, least in (("launches", 0), ("batches", 0), ("processes", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}")

    def one(number: int) -> Outcome:
        shares = [-(-total // count) for total in (options.launches, options.batches)]
        outcome = soak(
            [options.implementation, str(options.seed * count + number), *map(str, shares)],
            options.seconds,
        )
        said = "; ".join(outcome.problems) or "ok"
        print(
            f"process {number}: {outcome.launches:,} launches, {outcome.batches} batches: {said}",
            flush=True,
        )
        return outcome

    start = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        outcomes = list(pool.map(one, range(count)))
    launches = sum(outcome.launches for outcome in outcomes)
    batches = sum(outcome.batches for outcome in outcomes)
    failed = sum(bool(outcome.problems) for outcome in outcomes)
    print(
        f"{launches:,} launches and {batches} batches in {time.perf_counter() - start:.0f} s; "
        f"{failed} of {count} processes failed"
    )
    return int(failed > 0)


def soak(arguments: Sequence[str], seconds: float) -> Outcome:
    """Runs one process of soak_process with these arguments under a watchdog."""
    command = [sys.executable, "-m", "benchmarks.soak_process", *arguments]
    errors: list[str | None] = []
    lines: SimpleQueue[str | None] = SimpleQueue()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        readers = [
            threading.Thread(target=_forward, args=(process.stdout, lines.put)),
            threading.Thread(target=_forward, args=(process.stderr, errors.append)),
        ]
        for reader in readers:
            reader.start()
        outcome = _watch(lines, seconds)
        silent = outcome.problems[-1:] == [hung(seconds)]
        if silent:
            process.kill()
        code = process.wait()
        for reader in readers:
            reader.join()
    if code and not silent:
        said = [line.strip() for line in errors if line] or ["no message"]
        outcome.problems.append(f"crashed ({code}): {said[-1]}")
    return outcome


def hung(seconds: float) -> str:
    """What is said of a process that was silent for so long."""
    return f"hung for {seconds:g} s"


def _watch(lines: SimpleQueue[str | None], seconds: float) -> Outcome:
    """Adds up what a process says, until it ends or says nothing for too long."""
    outcome = Outcome()
    on_cpu = False
    while True:
        try:
            line = lines.get(timeout=None if on_cpu else seconds)
        except Empty:
            outcome.problems.append(hung(seconds))
            return outcome
        if line is None:
            return outcome
        message = json.loads(line)
        on_cpu = message.get("at") == REFERENCE
        outcome.launches += message.get("launches", 0)
        outcome.batches += message.get("batches", 0)
        outcome.problems += message.get("wrong", [])


def _forward(stream: Iterable[str] | None, put: Callable[[str | None], object]) -> None:
    for line in stream or ():
        put(line)
    put(None)


if __name__ == "__main__":
    sys.exit(main())
