"""How parts of the query gradients get to the sums in global memory (Gluon device code)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from sigjax.kernels.hopper_exchange import in_order


@gluon.jit
def stage_part(sums, part, PLACED: gl.constexpr):
    """Puts a part [BLOCK_Q, columns] where TMA reads it, once it has read the last one.

    The part is one of hopper_exchange: PLACED, or transposed.
    """
    tma.store_wait(0)
    sums.store(in_order(part) if PLACED else part.permute((1, 0)))
    fence_async_shared()


@gluon.jit
def add_staged(query_gradient_desc, sums, batch, start, column):
    """Adds the staged part to rows start.. and columns column.. of a sequence."""
    tma.async_atomic_add(
        query_gradient_desc,
        [batch, start, column],
        sums.reshape([1, sums.shape[0], sums.shape[1]]),
    )
