"""One case of sanitize: runs kernels once and says so."""

import os
import sys

import jax
import jax.numpy as jnp
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from benchmarks.sanitize import CASES, CONTROL, RAN
from sigjax import numerics
from sigjax.attention import sigmoid_attention
from sigjax.kernels import hopper_launch, launch  # noqa: F401 (mends jax-triton for Gluon)
from sigjax.numerics import Case

LAYOUT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
PROGRAMS = 1024  # what racecheck takes for a race it reports of some alone
LENGTHS = ((333, 200), (129, 131), (1, 0), (0, 64))


@gluon.jit
def control_kernel(
    result_ptr,  # [4, 128] int32
):
    """As many warpgroups as our kernels have, which share nothing: each fills a row of its own."""
    gl.warp_specialize(
        [(fill, (result_ptr, 0)), (fill, (result_ptr, 1)), (fill, (result_ptr, 2)),
         (fill, (result_ptr, 3))],
        [4, 4, 4],
        [24, 24, 24],
    )  # fmt: skip


@gluon.jit
def fill(result_ptr, ROW: gl.constexpr):
    """Writes the row's number."""
    columns = gl.arange(0, 128, layout=LAYOUT)
    gl.store(result_ptr + ROW * 128 + columns, gl.full([128], ROW, gl.int32, layout=LAYOUT))


def main() -> None:
    """The process under the sanitizer: the case and the tool as arguments."""
    case, tool = sys.argv[1:3]
    if case not in CASES:
        msg = f"case must be one of {', '.join(CASES)}, got {case!r}"
        raise ValueError(msg)
    if case == CONTROL:
        jax.block_until_ready(jax.jit(control)())
    else:
        attention = Case("bfloat16", int(case[1:]), 333, 200, lengths=LENGTHS)
        numerics.run(sigmoid_attention, attention, numerics.make_inputs(attention))
    print(RAN, flush=True)
    if tool == "memcheck":  # under which Python's own end crashes in CUDA's
        os._exit(0)


def control() -> jax.Array:
    """Runs the kernel that shares nothing."""
    return launch.call(
        control_kernel,
        (),
        jax.ShapeDtypeStruct((4, 128), jnp.int32),
        (PROGRAMS,),
        {"num_warps": 4} | launch.compiler_options(maxnreg=64),
    )


if __name__ == "__main__":
    main()
