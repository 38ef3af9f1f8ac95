"""The first launch of new kernels: each case in a process of its own, under a watchdog.

A kernel that hangs or spoils the device's state ends its own process only.

    SIGJAX_HOPPER=forward,backward python -m benchmarks.first_launch --seconds 90

Every line says what became of a case: ok, what broke the tolerance rule, crashed or hung.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Literal

from sigjax import numerics
from sigjax.attention import sigmoid_attention
from sigjax.numerics import Case

# What a new kernel meets, from the simplest on: full tiles, edges, lengths, causality, groups,
# windows, segments, masks; a bias of the grid is float32, which is not theirs.
CASES = (
    [
        Case(dtype, head_size, length, keys, groups, causal, biases, lengths)
        for head_size in (64, 128)
        for dtype, length, keys, groups, causal, biases, lengths in (
            ("bfloat16", 512, 512, 1, False, False, None),
            ("bfloat16", 333, 200, 1, False, False, None),
            ("bfloat16", 333, 200, 2, False, False, ((333, 200), (1, 0), (129, 131))),
            ("bfloat16", 512, 512, 1, True, False, None),
            ("bfloat16", 333, 200, 2, True, True, ((333, 200), (1, 0), (129, 131))),
            ("float16", 333, 200, 2, False, False, ((333, 200), (1, 0), (129, 131))),
        )
    ]
    + [
        Case(dtype, head_size, 333, 400, groups, causal, lengths=lengths, extra=extra)
        for head_size in (64, 128)
        for extra in ("window", "segments", "mask")
        for dtype, groups, causal, lengths in (
            ("bfloat16", 1, False, None),
            ("float16", 2, True, ((333, 400), (1, 0), (129, 131))),
        )
    ]
    + [
        # With many keys weights are small, or here and there not: what adaptive weights are for.
        Case("bfloat16", head_size, 200, 4096, lengths=lengths, scale=factor * head_size**-0.5)
        for head_size in (64, 128)
        for lengths, factor in (
            (None, 1.0),
            (None, 1.3),
            (((200, 4096), (77, 3001)), 1.3),
            (None, 8.0),
        )
    ]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 where every case is right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=90, help="that one process may take")
    parser.add_argument("--implementation", default="triton", choices=("triton", "xla"))
    parser.add_argument("--processes", type=int, default=1, help="that run side by side")
    parser.add_argument("--only", help="cases whose label contains this")
    options = parser.parse_args(arguments)
    cases = [case for case in CASES if options.only is None or options.only in case.label]
    if not cases:
        parser.error(f"--only must be a part of a case's label, got {options.only!r}")

    def timed(case: Case) -> tuple[str, float]:
        start = time.perf_counter()
        verdict = launch(case, options.implementation, options.seconds)
        return verdict, time.perf_counter() - start

    failed = 0
    with ThreadPoolExecutor(options.processes) as pool:
        for case, (verdict, seconds) in zip(cases, pool.map(timed, cases), strict=True):
            failed += verdict != "ok"
            print(f"{case.label}: {verdict} ({seconds:.0f} s)", flush=True)
    print(f"{len(cases) - failed} of {len(cases)} are right")
    return int(failed > 0)


def launch(case: Case, implementation: str, seconds: float) -> str:
    """What became of one case in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.first_launch_case", implementation]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(asdict(case)),
            # Filtered tracebacks end on a note, not on the error.
            env={**os.environ, "JAX_TRACEBACK_FILTERING": "off"},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"hung for {seconds:g} s"
    if done.returncode:
        print(f"{case.label}:\n{done.stderr}", file=sys.stderr, flush=True)
        lines = done.stderr.strip().splitlines() or ["no message"]
        return f"crashed ({done.returncode}): {lines[-1]}"
    wrong = json.loads(done.stdout)
    return "; ".join(wrong) if wrong else "ok"


def violations(case: Case, implementation: Literal["triton", "xla"]) -> list[str]:
    """What one case breaks of the tolerance rule, in this process."""
    inputs = numerics.make_inputs(case)
    op = partial(sigmoid_attention, implementation=implementation)
    got = numerics.run(op, case, inputs)
    return numerics.violations(got, numerics.exact(case, inputs), numerics.run_plain(case, inputs))


if __name__ == "__main__":
    sys.exit(main())
