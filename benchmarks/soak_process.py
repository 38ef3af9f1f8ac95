"""One process of soak: launches with random lengths, says how far it is on standard output."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
from jax import Array

from benchmarks.soak import REFERENCE
from sigjax import numerics
from sigjax.attention import sigmoid_attention
from sigjax.numerics import Case

type Implementation = Literal["triton", "xla"]

SHAPES = 4  # of a process; each is compiled once
SAID_EVERY = 50  # launches
LONGEST = {"triton": 1500, "xla": 40}  # T and S
HEAD_SIZES = {"triton": (64, 128), "xla": (16,)}


def main() -> None:
    """The process that may hang: implementation, seed, launches, batches as arguments."""
    implementation: Any = sys.argv[1]
    seed, launches, batches = map(int, sys.argv[2:5])
    if implementation not in LONGEST:
        msg = f"implementation must be triton or xla, got {implementation!r}"
        raise ValueError(msg)
    generator = np.random.default_rng(seed)
    op = partial(sigmoid_attention, implementation=implementation)
    cases = [random_case(generator, implementation) for _ in range(SHAPES)]
    launch(generator, op, cases, launches)
    for number in range(batches):
        case = cases[number % SHAPES]
        compare(
            replace(case, lengths=random_lengths(generator, case)),
            op,
            int(generator.integers(2**31)),
        )


def say(**message: Any) -> None:
    """One message to the process that watches."""
    print(json.dumps(message), flush=True)


def random_case(generator: np.random.Generator, implementation: Implementation) -> Case:
    """A batch of 1 to 6 sequences with lengths from 0 on, edges of tiles more often than others."""
    longest = LONGEST[implementation]
    length, key_length = generator.integers(1, longest + 1, 2).tolist()
    case = Case(
        dtype=str(generator.choice(["bfloat16", "float16"])),
        head_size=int(generator.choice(HEAD_SIZES[implementation])),
        length=length,
        key_length=key_length,
        groups=int(generator.integers(1, 3)),
        is_causal=bool(generator.integers(2)),
        lengths=((0, 0),) * int(generator.integers(1, 7)),
    )
    return replace(case, lengths=random_lengths(generator, case))


def random_lengths(generator: np.random.Generator, case: Case) -> tuple[tuple[int, int], ...]:
    """Numbers of queries and keys of each sequence of a case."""
    return tuple(
        (random_length(generator, case.length), random_length(generator, case.key_length))
        for _ in range(case.batch)
    )


def random_length(generator: np.random.Generator, longest: int) -> int:
    """0 to longest; half of the time a multiple of 64, or one beside it."""
    if generator.integers(2):
        return int(generator.integers(0, longest + 1))
    edge = 64 * int(generator.integers(0, longest // 64 + 1)) + int(generator.integers(-1, 2))
    return min(max(edge, 0), longest)


def launch(
    generator: np.random.Generator, op: Callable[..., Array], cases: Sequence[Case], launches: int
) -> None:
    """Output and gradients of the cases' shapes, with new lengths at every launch."""
    if not launches:
        return
    ready = []
    for case in cases:
        inputs = jax.device_put(numerics.make_inputs(case))
        run = numerics.compiled(op, case)
        jax.block_until_ready(run(inputs))
        ready.append((case, inputs, run))
        say(at="compiled")
    unsaid = 0
    for number in range(launches):
        case, inputs, run = ready[int(generator.integers(len(cases)))]
        lengths = np.array(random_lengths(generator, case), np.int32).T
        names = ("query_seq_lengths", "key_value_seq_lengths")
        jax.block_until_ready(run(inputs | dict(zip(names, lengths, strict=True))))
        unsaid += 1
        if unsaid == SAID_EVERY or number == launches - 1:
            say(launches=unsaid)
            unsaid = 0


def compare(case: Case, op: Callable[..., Array], seed: int = 0) -> None:
    """One batch against the oracle."""
    inputs = numerics.make_inputs(case, seed)
    got = numerics.run(op, case, inputs)
    say(at=REFERENCE)
    exact, plain = numerics.exact(case, inputs), numerics.run_plain(case, inputs)
    wrong = numerics.violations(got, exact, plain)
    say(batches=1, wrong=[f"{case.label}: {line}" for line in wrong])


if __name__ == "__main__":
    main()
