"""Host side of the kernels: which serves a call, grids, and the only calls of jax_triton."""

import math
import os
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
from jax import Array

# jax-triton reads it at import: without it no multiply and add are fused.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import jax_triton

from sigjax import reference
from sigjax.kernels import features, hopper_choice, kernel_cache
from sigjax.kernels.backward import key_value_gradient_kernel, query_gradient_kernel
from sigjax.kernels.bias_gradient import bias_gradient_kernel
from sigjax.kernels.forward import forward_kernel
from sigjax.kernels.segments import segment_kernel
from sigjax.kernels.tile_math import PAIR, PLAIN, TF32, TF32X3
from sigjax.kernels.tiles import ForwardTile, Kernel, Tile, choose_tile, head_block
from sigjax.operands import Gradients, Operands, Settings

kernel_cache.install()

# XLA assembles the PTX with its own ptxas, which may be older than Triton's: Triton 3.9
# would emit PTX 9.4, which CUDA 13.0 refuses. 8.7 is what CUDA 12.8 and newer take.
PTX_VERSION = 87


class Packing(NamedTuple):
    """What the kernels need to know of segments; None where there are none.

    Attributes:
        row_bias: [B, T] float32: -log(number of keys) of each query; None where the caller gives
            sigmoid_bias.
        ranges: [B, query tiles, 3] int32, see segments.tile_ranges: the keys of a tile of queries.
    """

    row_bias: Array | None = None
    ranges: Array | None = None


def forward(operands: Operands, settings: Settings) -> Array:
    """The output [B, T, N, H], from the kernel of this GPU."""
    if operands.query.size == 0:
        return jnp.zeros_like(operands.query)
    if hopper_choice.serves("forward", operands, settings):
        from sigjax.kernels import hopper_launch

        return hopper_launch.forward(operands, settings)
    return portable_forward(operands, settings)


def backward(operands: Operands, settings: Settings, output_gradient: Array) -> Gradients:
    """The gradients of every floating operand, from the kernels of this GPU."""
    if operands.query.size == 0 or operands.key.size == 0:
        return _zero_gradients(operands)
    if hopper_choice.serves("backward", operands, settings):
        from sigjax.kernels import hopper_backward_launch

        return hopper_backward_launch.backward(operands, settings, output_gradient)
    return portable_backward(operands, settings, output_gradient)


def portable_forward(operands: Operands, settings: Settings, tile: Tile | None = None) -> Array:
    """The output [B, T, N, H] from the portable kernel; a tile other than the table's to tune."""
    query = operands.query
    tile = tile or tile_of("forward", operands)
    packing = packing_of(operands, tile)
    inputs = (
        query,
        operands.key,
        operands.value,
        *_per_sequence(operands),
        *_per_pair(operands, packing, packing.ranges),
        query.shape[1],
        operands.key.shape[1],
        settings.scale,
    )
    return call(
        forward_kernel,
        inputs,
        _result(query, settings),
        _query_grid(query, tile),
        _options(operands, settings, tile),
    )


def portable_backward(operands: Operands, settings: Settings, output_gradient: Array) -> Gradients:
    """The gradients of every floating operand, from the portable kernels."""
    packing = packing_of(operands, tile_of("query_gradient", operands))
    key_gradient, value_gradient, sums = key_value_gradient(
        operands, settings, output_gradient, packing=packing
    )
    bias, sigmoid_bias, key_bias = operands.bias, operands.sigmoid_bias, operands.key_bias
    if bias is not None and features.has_queries(bias):
        bias = bias_gradient(operands, settings, output_gradient)
    elif bias is not None:
        axes = tuple(axis for axis in (0, 1, 3) if bias.shape[axis] == 1)
        bias = summed(sums if sums is None else sums[:, :, None], bias, axes, settings)
    if sigmoid_bias is not None:
        sigmoid_bias = summed(sums, sigmoid_bias, 2, settings)
    if key_bias is not None:
        key_bias = summed(sums, key_bias, 1, settings)
    return Gradients(
        query=query_gradient(operands, settings, output_gradient, packing=packing),
        key=key_gradient,
        value=value_gradient,
        bias=bias,
        sigmoid_bias=sigmoid_bias,
        key_bias=key_bias,
    )


def query_gradient(
    operands: Operands,
    settings: Settings,
    output_gradient: Array,
    tile: Tile | None = None,
    packing: Packing | None = None,
) -> Array:
    """The gradient of the query, [B, T, N, H]; a tile other than the table's to tune.

    packing is packing_of the operands and the tile, where the caller has it.
    """
    query = operands.query
    tile = tile or tile_of("query_gradient", operands)
    packing = packing or packing_of(operands, tile)
    return call(
        query_gradient_kernel,
        (
            *_backward_inputs(operands, output_gradient),
            *_per_pair(operands, packing, packing.ranges),
            range_scale(operands, output_gradient),
            query.shape[1],
            operands.key.shape[1],
            settings.scale,
        ),
        _result(query, settings),
        _query_grid(query, tile),
        _options(operands, settings, tile),
    )


def key_value_gradient(
    operands: Operands,
    settings: Settings,
    output_gradient: Array,
    tile: Tile | None = None,
    packing: Packing | None = None,
) -> tuple[Array, Array, Array | None]:
    """Gradients of key and value, [B, S, K, H], and of the logits summed over the queries.

    The sums, [B, N, S] float32, are None where nobody asks for a bias's gradient. Of packing,
    where the caller has it, only row_bias is used.
    """
    query, key = operands.query, operands.key
    tile = tile or tile_of("key_value_gradient", operands)
    packing = packing or packing_of(operands, tile)
    batch, keys, kv_heads, _ = key.shape
    out_type = [_result(key, settings)] * 2
    options = _options(operands, settings, tile)
    summed = [operands.sigmoid_bias, operands.key_bias] if settings.bias_gradients else []
    if operands.bias is not None and not features.has_queries(operands.bias):
        summed.append(operands.bias)
    if all(x is None for x in summed):
        options["logit_sums_ptr"] = None
    else:
        out_type.append(jax.ShapeDtypeStruct((batch, query.shape[2], keys), jnp.float32))
    key_gradient, value_gradient, *sums = call(
        key_value_gradient_kernel,
        (
            *_backward_inputs(operands, output_gradient),
            *_per_pair(operands, packing, query_ranges(operands, tile)),
            range_scale(operands, output_gradient),
            query.shape[1],
            keys,
            settings.scale,
        ),
        out_type,
        (-(-keys // tile.block_k) * kv_heads * batch,),
        options,
    )
    return key_gradient, value_gradient, sums[0] if sums else None


def bias_gradient(operands: Operands, settings: Settings, output_gradient: Array) -> Array:
    """The gradient of a bias with an axis of queries, from the kernel of this GPU."""
    if hopper_choice.serves_bias_gradient(operands, settings):
        from sigjax.kernels import hopper_bias_launch

        return hopper_bias_launch.bias_gradient(operands, settings, output_gradient)
    return portable_bias_gradient(operands, settings, output_gradient)


def portable_bias_gradient(operands: Operands, settings: Settings, output_gradient: Array) -> Array:
    """The gradient of a bias [B or 1, N or 1, T, S or 1], summed where it broadcasts.

    That of a bias without the axis of queries comes from key_value_gradient's sums.
    """
    query, key, bias = operands.query, operands.key, operands.bias
    if bias is None:
        msg = "bias_gradient needs operands with a bias, got None"
        raise ValueError(msg)
    if not features.has_queries(bias):
        msg = f"bias_gradient needs a bias with an axis of queries, got {bias.shape}"
        raise ValueError(msg)
    tile = tile_of("bias_gradient", operands)
    packing = packing_of(operands, tile)
    blocks = (1, 1, tile.block_q, tile.block_k)
    grid = math.prod(-(-size // block) for size, block in zip(bias.shape, blocks, strict=True))
    return call(
        bias_gradient_kernel,
        (
            *_backward_inputs(operands, output_gradient),
            *_per_pair(operands, packing, packing.ranges),
            query.shape[0],
            query.shape[1],
            key.shape[1],
            settings.scale,
        ),
        _result(bias, settings),
        (grid,),
        _options(operands, settings, tile),
    )


def range_scale(operands: Operands, output_gradient: Array) -> Array | None:
    """By which power of two float16 logit gradients are held, [B, K]; None for other dtypes.

    A logit's gradient is near 1/n of the output's and would be subnormal. It is at most
    H · max|output gradient| · max|value| / 4; the scale brings that bound to 2^15. Maxima and
    powers of two are exact, so a sequence's bits do not depend on its bucket.
    """
    if operands.query.dtype != jnp.float16:
        return None
    batch, _, kv_heads, head_size = operands.key.shape
    rows = reference.valid_queries(operands)[:, :, None, None]
    columns = reference.valid_keys(operands)[:, :, None, None]
    gradient = jnp.where(rows, jnp.abs(output_gradient.astype(jnp.float32)), 0)
    gradient = gradient.max((1, 3)).reshape(batch, kv_heads, -1).max(2)
    value = jnp.where(columns, jnp.abs(operands.value.astype(jnp.float32)), 0).max((1, 3))
    bound = gradient * value * (head_size / 4)
    exponent = jnp.where((bound > 0) & jnp.isfinite(bound), jnp.frexp(bound)[1], 0)
    return jnp.ldexp(jnp.ones_like(bound), jnp.clip(15 - exponent, -60, 60))


def _backward_inputs(operands: Operands, output_gradient: Array) -> tuple[Array | None, ...]:
    arrays = (operands.query, operands.key, operands.value, output_gradient)
    return (*arrays, *_per_sequence(operands))


def _per_sequence(operands: Operands) -> tuple[Array | None, ...]:
    """Lengths, sigmoid_bias and key_bias, as every portable kernel takes them."""
    lengths = (operands.query_lengths, operands.key_lengths)
    return (*lengths, as_float32(operands.sigmoid_bias), as_float32(operands.key_bias))


def _per_pair(
    operands: Operands, packing: Packing, ranges: Array | None
) -> tuple[Array | None, ...]:
    """bias, mask, segments, the rows' bias and the tiles' ranges, as the kernels take them."""
    shape = features.logits_shape(operands)
    bias, mask = operands.bias, operands.mask
    # Numbers of fewer than four bytes are loaded one at a time where they are not a matrix.
    if bias is not None and not features.is_matrix(bias, shape):
        bias = as_float32(bias)
    if mask is not None:
        # Two bytes a pair, of which a thread has two in a register: single bytes cost it more.
        dtype = jnp.float16 if features.is_matrix(mask, shape) else jnp.float32
        mask = jnp.where(mask, jnp.nan, jnp.inf).astype(dtype)
    segments = (operands.query_segments, operands.key_segments)
    return bias, mask, *segments, packing.row_bias, ranges


def packing_of(operands: Operands, tile: Tile | ForwardTile) -> Packing:
    """The bias of rows and the keys of tiles of queries."""
    queries, keys = operands.query_segments, operands.key_segments
    if queries is None or keys is None:
        return Packing()
    ranges, row_bias = _segments(
        queries, keys, operands.query_lengths, operands.key_lengths, tile.block_q,
        with_bias=operands.sigmoid_bias is None,
    )  # fmt: skip
    return Packing(row_bias, ranges)


def query_ranges(operands: Operands, tile: Tile) -> Array | None:
    """The queries of tiles of keys, as Packing.ranges has the keys; None without segments."""
    queries, keys = operands.query_segments, operands.key_segments
    if queries is None or keys is None:
        return None
    return _segments(
        keys, queries, operands.key_lengths, operands.query_lengths, tile.block_k, with_bias=False
    )[0]


def _segments(
    segments: Array,
    others: Array,
    lengths: Array | None,
    other_lengths: Array | None,
    block: int,
    *,
    with_bias: bool,
) -> tuple[Array, Array | None]:
    batch, length = segments.shape
    tiles = -(-length // block)
    out_type = [jax.ShapeDtypeStruct((batch, tiles, 3), jnp.int32)]
    options = {"BLOCK": block, "num_warps": 4, "num_stages": 1} | compiler_options()
    if with_bias:
        out_type.append(jax.ShapeDtypeStruct((batch, length), jnp.float32))
    else:
        options["row_bias_ptr"] = None
    inputs = (segments, others, lengths, other_lengths, length, others.shape[1])
    ranges, *row_bias = call(segment_kernel, inputs, out_type, (tiles * batch,), options)
    return ranges, row_bias[0] if row_bias else None


def _arithmetic(operands: Operands, settings: Settings) -> int:
    """How weights and products are computed, see tile_math."""
    if operands.query.dtype.itemsize == 2:
        return PAIR.value
    return {"highest": PLAIN, "high": TF32X3, "default": TF32}[settings.precision].value


def _axes(x: Array | None, shape: tuple[int, ...]) -> tuple[bool, ...] | None:
    """Which axes of [B, N, T, S] an array has; one of size 1 counts as had where all have it.

    And whether its rows have a multiple of 16 elements, see pairs.row_size.
    """
    if x is None:
        return None
    axes = tuple(a == b for a, b in zip(x.shape, shape, strict=True))
    return (*axes, axes[3] and shape[3] % 16 == 0)


def _shared(operands: Operands) -> tuple[bool, bool]:
    """Whether all sequences, and all heads, share the tiles of a bias or mask: read once then."""
    shape = features.logits_shape(operands)
    axes = [_axes(x, shape) for x in (operands.bias, operands.mask) if features.is_matrix(x, shape)]
    batch, head = (any(x is not None and not x[axis] for x in axes) for axis in (0, 1))
    return batch, head


def call(
    kernel: triton.JITFunction,
    inputs: tuple[Any, ...],
    out_type: Any,
    grid: tuple[int],
    options: dict[str, Any],
    aliases: dict[int, int] | None = None,
) -> Any:
    """The one call of jax_triton: a misspelled operand keyword would become a metaparameter.

    Operands in aliases are written to: they are the outputs of those numbers, which must be the
    last: jaxlib hands the kernel the outputs' buffers in their order, aliased ones too.
    """
    outputs = len(jax.tree.leaves(out_type))
    if aliases and min(aliases.values()) != outputs - len(aliases):
        msg = f"aliases must be the last outputs of {outputs}, got {sorted(aliases.values())}"
        raise ValueError(msg)
    name = f"sigjax_{kernel.__name__}"
    with warnings.catch_warnings():
        # jax-triton would rather have a Ref; but a Ref is an effect, and custom_partitioning
        # lowers no program with effects.
        warnings.filterwarnings("ignore", "input_output_aliases is deprecated")
        return jax_triton.triton_call(
            *inputs,
            kernel=kernel,
            name=name,
            out_type=out_type,
            grid=grid,
            input_output_aliases=aliases,
            **options,
        )


def summed(
    sums: Array | None, bias: Array, axes: int | tuple[int, ...], settings: Settings
) -> Array:
    """The gradient of a bias from that of the logits, summed over axes; 0 where not asked for."""
    if sums is None:
        return jnp.zeros_like(bias)
    return sums.sum(axes).reshape(bias.shape).astype(_result(bias, settings).dtype)


def _result(like: Array, settings: Settings) -> jax.ShapeDtypeStruct:
    """Shape of an operand, in the dtype that is asked of its output or gradient."""
    return jax.ShapeDtypeStruct(like.shape, settings.result_dtype or like.dtype)


def tile_of(kernel: Kernel, operands: Operands) -> Tile:
    """The tile of a portable kernel for these operands."""
    query = operands.query
    pairs = features.pairs_of(operands)
    return choose_tile(kernel, query.shape[-1], query.dtype.itemsize, features.capability(), pairs)


def _query_grid(query: Array, tile: Tile) -> tuple[int]:
    batch, length, heads, _ = query.shape
    return (-(-length // tile.block_q) * heads * batch,)


def _options(operands: Operands, settings: Settings, tile: Tile) -> dict[str, Any]:
    """What every launch passes by keyword: the constexprs and the compiler's options."""
    heads, head_size = operands.query.shape[2:]
    logits = features.logits_shape(operands)
    left, right = features.window_of(settings)
    limit = {} if tile.max_registers is None else {"maxnreg": tile.max_registers}
    return {
        "N": heads,
        "K": operands.key.shape[2],
        "H": head_size,
        "BLOCK_H": head_block(head_size),
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "STAGES": tile.num_stages,
        "LEFT": left,
        "RIGHT": right,
        "BIAS_AXES": _axes(operands.bias, logits),
        "MASK_AXES": _axes(operands.mask, logits),
        "SHARED": _shared(operands),
        "ARITHMETIC": _arithmetic(operands, settings),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    } | compiler_options(**limit)


def compiler_options(**backend_options: int) -> dict[str, Any]:
    """What every launch tells Triton's compiler."""
    fixed = {"ptx_version": PTX_VERSION, "enable_fp_fusion": True}
    return {"compute_capability": features.capability(), "backend_options": fixed | backend_options}


def as_float32(x: Array | None) -> Array | None:
    """A bias as the kernels take it."""
    return None if x is None else x.astype(jnp.float32)


def _zero_gradients(operands: Operands) -> Gradients:
    def zeros(x: Array | None) -> Array | None:
        return None if x is None else jnp.zeros_like(x)

    return Gradients(
        query=jnp.zeros_like(operands.query),
        key=jnp.zeros_like(operands.key),
        value=jnp.zeros_like(operands.value),
        bias=zeros(operands.bias),
        sigmoid_bias=zeros(operands.sigmoid_bias),
        key_bias=zeros(operands.key_bias),
    )
