"""What biases and scales do in the Hopper backward kernel, and what biases get from it (Gluon)."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sigjax.kernels.hopper_math import accumulator_layout, head_offset, key_bias_row
from sigjax.kernels.tile_math import LOG2_E

SIDE_KEYS = gl.constexpr(64)  # keys of one warpgroup


class Factors(NamedTuple):
    """What makes logits of scores, and by what their gradients are held."""

    sigmoid_bias_ptr: Any  # None where it follows from the number of keys
    range_scale_ptr: Any  # of float16, else None
    scale: Any
    key_bias_ptr: Any  # or None


@gluon.jit
def common_offset(factors, work, options):
    """What every query head of a key head adds to t; anything where the caller's biases differ."""
    if options.N == options.K:
        batch_head = work.batch * options.N + work.kv_head
        return head_offset(factors.sigmoid_bias_ptr, batch_head, work.key_length)
    else:
        return head_offset(None, 0, work.key_length)


@gluon.jit
def offset_of(factors, work, head, common, options):
    """What a query head adds to t."""
    if factors.sigmoid_bias_ptr is None or options.N == options.K:
        return common
    else:
        return head_offset(factors.sigmoid_bias_ptr, work.batch * options.N + head, 0)


@gluon.jit
def key_offset_of(factors, sequences, work, row, key_ids, options):
    """What a key adds to t, [SIDE_KEYS], nothing where it is padding; 0 without a bias a key."""
    if factors.key_bias_ptr is None:
        return 0
    else:
        layout: gl.constexpr = gl.SliceLayout(1, accumulator_layout(options.BLOCK_Q))
        keys = row + gl.arange(0, SIDE_KEYS, layout=layout)
        # Where the bias has an axis of heads there are as many of keys as of queries.
        bias_row = key_bias_row(work.batch, work.kv_head, options.K, options.KEY_AXES)
        pointers = factors.key_bias_ptr + bias_row.to(gl.int64) * sequences.S + keys
        inside = keys < work.key_length
        if sequences.key_segments_ptr is not None:
            inside = key_ids > 0
        return gl.load(pointers, mask=inside, other=0.0) * -LOG2_E


@gluon.jit
def range_scale_at(factors, batch_head):
    """The power of two by which float16 logit gradients are held; 1 for other dtypes."""
    if factors.range_scale_ptr is None:
        return 1.0
    else:
        return gl.load(factors.range_scale_ptr + batch_head)


@gluon.jit
def scaled(gradient, factors, range_scale):
    """Logits' gradients as float16 holds them."""
    if factors.range_scale_ptr is None:
        return gradient
    else:
        return gradient * range_scale


@gluon.jit
def no_sums(outputs, options):
    """Where the sums over the queries begin, [SIDE_KEYS]; 0 where nobody asks for them."""
    if outputs.logit_sums_ptr is None:
        return 0
    else:
        layout: gl.constexpr = gl.SliceLayout(1, accumulator_layout(options.BLOCK_Q))
        return gl.zeros([SIDE_KEYS], gl.float32, layout=layout)


@gluon.jit
def with_sums(sums, gradient, outputs):
    """The sums with those of one step's queries."""
    if outputs.logit_sums_ptr is None:
        return sums
    else:
        return sums + gl.sum(gradient, 1)


@gluon.jit
def store_sums(outputs, sums, sequences, work, row, options):
    """Stores the sums over the queries, 0 for keys past the length."""
    if outputs.logit_sums_ptr is not None:
        batch_head = work.batch * options.N + work.kv_head
        S = sequences.S
        keys = row + gl.arange(0, SIDE_KEYS, layout=sums.type.layout)
        sums = gl.where(keys < work.key_length, sums, 0.0)
        gl.store(outputs.logit_sums_ptr + batch_head.to(gl.int64) * S + keys, sums, mask=keys < S)
