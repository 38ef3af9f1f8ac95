"""One case of sanitize: runs kernels once and says so."""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from benchmarks.sanitize import CASES, CONTROL, RAN
from sigjax import numerics
from sigjax.attention import sigmoid_attention
from sigjax.kernels import hopper_launch, launch  # noqa: F401 (mends jax-triton for Gluon)
from sigjax.kernels.hopper_queue import ask, hear, new_queue
from sigjax.numerics import Case

PROGRAMS = 1024  # what racecheck takes for a race it reports of some alone
HANDED = gl.constexpr(8)  # numbers a program
CONSUMERS = gl.constexpr(3)
LENGTHS = ((333, 200), (129, 131), (1, 0), (0, 64))


@gluon.jit
def control_kernel(
    counter_ptr,  # [1] int32, 0
    result_ptr,  # [PROGRAMS, CONSUMERS, HANDED] int32
):
    """As many warpgroups as our kernels have, which share but the numbers of hopper_queue."""
    queue = new_queue(counter_ptr, CONSUMERS)
    gl.warp_specialize(
        [(hand_over, (queue,)), (keep, (queue, result_ptr, 0)), (keep, (queue, result_ptr, 1)),
         (keep, (queue, result_ptr, 2))],
        [4, 4, 4],
        [24, 24, 24],
    )  # fmt: skip


@gluon.jit
def hand_over(queue):
    """Gives the consumers HANDED numbers."""
    for taken in range(HANDED):
        ask(queue, 0, taken)


@gluon.jit
def keep(queue, result_ptr, CONSUMER: gl.constexpr):
    """Writes down what a consumer is given; late, so that it does not wait for it."""
    row = gl.program_id(0) * CONSUMERS + CONSUMER
    for taken in range(HANDED):
        gl.store(result_ptr + row * HANDED + taken, hear(queue, slept(taken)))


@gluon.jit
def slept(x):
    """Gives x back after some microseconds."""
    return gl.inline_asm_elementwise(
        "nanosleep.u32 5000; mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


def main() -> None:
    """The process under the sanitizer: the case and the tool as arguments."""
    case, tool = sys.argv[1:3]
    if case not in CASES:
        msg = f"case must be one of {', '.join(CASES)}, got {case!r}"
        raise ValueError(msg)
    if case == CONTROL:
        check(np.asarray(jax.jit(control)()))
    else:
        attention = Case("bfloat16", int(case[1:]), 333, 200, lengths=LENGTHS)
        numerics.run(sigmoid_attention, attention, numerics.make_inputs(attention))
    print(RAN, flush=True)
    if tool == "memcheck":  # under which Python's own end crashes in CUDA's
        os._exit(0)


def control() -> jax.Array:
    """The numbers that each consumer of the control was given, [PROGRAMS, CONSUMERS, HANDED]."""
    counter = jnp.zeros(1, jnp.int32)
    shape = (PROGRAMS, CONSUMERS.value, HANDED.value)
    numbers, _ = launch.call(
        control_kernel,
        (counter,),
        [jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)],
        (PROGRAMS,),
        {"num_warps": 4} | launch.compiler_options(maxnreg=64),
        aliases={0: 1},
    )
    return numbers


def check(numbers: np.ndarray) -> None:
    """That all consumers of a program were given the same numbers, and no two programs one.

    Raises:
        RuntimeError: so it is not.
    """
    first = numbers[:, :1]
    if (numbers != first).any() or len(np.unique(first)) != first.size:
        msg = "consumers of the control must be given the same numbers, each once; they were not"
        raise RuntimeError(msg)


if __name__ == "__main__":
    main()
