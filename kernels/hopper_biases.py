"""What biases and scales do in the Hopper backward kernel, and what biases get from it (Gluon).

factors are (sigmoid_bias, range_scale, scale, key_bias, KEY_AXES) and outputs (key gradient, value
gradient, logit sums) of the kernel, pointers or None.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sigjax.kernels.hopper_math import accumulator_layout, head_offset, key_bias_row
from sigjax.kernels.tile_math import LOG2_E

SIDE_KEYS = gl.constexpr(64)  # keys of one warpgroup


@gluon.jit
def common_offset(factors, batch_head, key_length, N: gl.constexpr, K: gl.constexpr):
    """What every query head of a key head adds to t; anything where the caller's biases differ."""
    if N == K:
        return head_offset(factors[0], batch_head, key_length)
    else:
        return head_offset(None, 0, key_length)


@gluon.jit
def offset_of(factors, batch_head, common, N: gl.constexpr, K: gl.constexpr):
    """What a query head adds to t."""
    if factors[0] is None or N == K:
        return common
    else:
        return head_offset(factors[0], batch_head, 0)


@gluon.jit
def key_offset_of(
    factors, batch, head, row, key_length, key_ids, work, N: gl.constexpr, BLOCK_Q: gl.constexpr
):
    """What a key adds to t, [SIDE_KEYS], nothing where it is padding; 0 without a bias a key."""
    if factors[3] is None:
        return 0
    else:
        layout: gl.constexpr = gl.SliceLayout(1, accumulator_layout(BLOCK_Q))
        keys = row + gl.arange(0, SIDE_KEYS, layout=layout)
        bias_row = key_bias_row(batch, head, N, factors[4])
        pointers = factors[3] + bias_row.to(gl.int64) * work[4] + keys
        inside = keys < key_length
        if work[6] is not None:
            inside = key_ids > 0
        return gl.load(pointers, mask=inside, other=0.0) * -LOG2_E


@gluon.jit
def range_scale_at(factors, batch_head):
    """The power of two by which float16 logit gradients are held; 1 for other dtypes."""
    if factors[1] is None:
        return 1.0
    else:
        return gl.load(factors[1] + batch_head)


@gluon.jit
def scaled(gradient, factors, range_scale):
    """Logits' gradients as float16 holds them."""
    if factors[1] is None:
        return gradient
    else:
        return gradient * range_scale


@gluon.jit
def no_sums(outputs, BLOCK_Q: gl.constexpr):
    """Where the sums over the queries begin, [SIDE_KEYS]; 0 where nobody asks for them."""
    if outputs[2] is None:
        return 0
    else:
        layout: gl.constexpr = gl.SliceLayout(1, accumulator_layout(BLOCK_Q))
        return gl.zeros([SIDE_KEYS], gl.float32, layout=layout)


@gluon.jit
def with_sums(sums, gradient, outputs):
    """The sums with those of one step's queries."""
    if outputs[2] is None:
        return sums
    else:
        return sums + gl.sum(gradient, 1)


@gluon.jit
def store_sums(outputs, sums, batch_head, row, key_length, S):
    """Stores the sums over the queries, 0 for keys past the length."""
    if outputs[2] is not None:
        keys = row + gl.arange(0, SIDE_KEYS, layout=sums.type.layout)
        sums = gl.where(keys < key_length, sums, 0.0)
        gl.store(outputs[2] + batch_head.to(gl.int64) * S + keys, sums, mask=keys < S)
