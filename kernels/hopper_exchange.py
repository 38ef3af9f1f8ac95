"""How the Hopper backward kernel hands logit gradients from warpgroup to warpgroup (Gluon).

A ring of four buffers: two steps, and of each step one buffer a side, [SIDE_KEYS, BLOCK_Q]. A
step is named by its number; -1, before the first, may be asked for and holds anything.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier


@gluon.jit
def hand_over(exchange, step, SIDE: gl.constexpr, operand):
    """Puts a step's logit gradients where the other warpgroups read them."""
    exchange_free(exchange, step - 2, SIDE)
    exchanged(exchange, step, SIDE).store(operand)
    fence_async_shared()
    mbarrier.arrive(exchange.full.index(step % 2 * 2 + SIDE), count=1)


@gluon.jit
def exchanged(exchange, step, SIDE: gl.constexpr):
    """The buffer of a step's logit gradients, [SIDE_KEYS, BLOCK_Q]; step may be -1."""
    return exchange.buffers.index((step & 1) * 2 + SIDE)


@gluon.jit
def exchange_full(exchange, step, SIDE: gl.constexpr, pred=True):
    """Waits until a side has handed over a step's logit gradients."""
    mbarrier.wait(exchange.full.index((step & 1) * 2 + SIDE), (step >> 1) & 1, pred=pred)


@gluon.jit
def exchange_free(exchange, step, SIDE: gl.constexpr):
    """Waits until a step's logit gradients were read; at once for steps before the first."""
    mbarrier.wait(exchange.free.index((step & 1) * 2 + SIDE), (step >> 1) & 1)


@gluon.jit
def exchange_release(exchange, step, SIDE: gl.constexpr, pred=True):
    """One reader is done with a step's logit gradients."""
    mbarrier.arrive(exchange.free.index((step & 1) * 2 + SIDE), count=1, pred=pred)
