"""How the Hopper backward kernel hands logit gradients from warpgroup to warpgroup (Gluon).

A ring of four buffers: two steps, and of each step one buffer a side. A step is named by its
number; -1, before the first, may be asked for and holds anything.

A warp that stores sums of query gradients, eight bytes a thread, has four queries in each half: of
the swizzled tile that TMA reads 0 to 3 share banks two by two, 260 of a step's 2,720 cycles of
shared memory at head size 128. PLACED they are 0, 2, 4 and 6: buffers are [places, SIDE_KEYS], with
queries in another order, in which the products with them have their rows. Else buffers are
[SIDE_KEYS, BLOCK_Q] and the products transposed, so that a thread's four bytes meet no conflict
either: twice the stores, but at 128 the other way leaves ptxas fewer uniform registers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier


@gluon.jit
def hand_over(exchange, step, SIDE: gl.constexpr, operand, PLACED: gl.constexpr):
    """Puts a step's logit gradients where the other warpgroups read them."""
    exchange_free(exchange, step - 2, SIDE)
    if PLACED:
        operand = in_places(operand.permute((1, 0)))
    exchanged(exchange, step, SIDE).store(operand)
    fence_async_shared()
    mbarrier.arrive(exchange.full.index(step % 2 * 2 + SIDE), count=1)


@gluon.jit
def exchanged(exchange, step, SIDE: gl.constexpr):
    """The buffer of a step's logit gradients; step may be -1."""
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


@gluon.jit
def in_places(x):
    """Rows of queries at their places: query 8 i + 4 a + 2 b + c at 8 i + 4 c + 2 a + b."""
    bits = x.reshape([x.shape[0] // 8, 2, 2, 2, x.shape[1]])
    return bits.permute((0, 3, 1, 2, 4)).reshape([x.shape[0], x.shape[1]])


@gluon.jit
def in_order(x):
    """Rows at their places in the order of queries."""
    bits = x.reshape([x.shape[0] // 8, 2, 2, 2, x.shape[1]])
    return bits.permute((0, 2, 3, 1, 4)).reshape([x.shape[0], x.shape[1]])
