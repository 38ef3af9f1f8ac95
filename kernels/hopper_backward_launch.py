"""Host side of the Hopper backward kernel: sums of query gradients, packed rows, biases."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sigjax import reference
from sigjax.kernels import features, hopper_matrices, launch, query_sums_launch
from sigjax.kernels.hopper_backward import hopper_backward_kernel
from sigjax.kernels.hopper_backward_pairs import PROGRAM_KEYS
from sigjax.kernels.hopper_biases import SIDE_KEYS
from sigjax.kernels.hopper_operands import (
    key_axes,
    key_bias_of,
    lengths_of,
    options_of,
    ragged_rows_of,
    rows_of,
)
from sigjax.kernels.schedule import order_of
from sigjax.kernels.tiles import BackwardTile, Tile, hopper_backward_tile
from sigjax.operands import Gradients, Operands, Settings

# Which operand of the kernel are the sums that it adds to.
_SUMS = 4


def backward(
    operands: Operands,
    settings: Settings,
    output_gradient: Array,
    tile: BackwardTile | None = None,
) -> Gradients:
    """The gradients of every floating operand; a tile other than the table's to tune.

    Raises:
        ValueError: the tile has no helper at head size 64.
    """
    query, key = operands.query, operands.key
    batch, length, heads, head_size = query.shape
    tile = tile or hopper_backward_tile(head_size)
    if head_size == 64 and not tile.helper:
        # Half of the columns of a transposed query gradient are fewer than a product's 64 rows.
        msg = "tile.helper must be True at head size 64, got False"
        raise ValueError(msg)
    range_scale = launch.range_scale(operands, output_gradient)
    lengths, order, view = lengths_of(operands), None, rows_of
    query_lengths = None
    if lengths is not None:
        query_lengths = lengths[0]
        order = order_of(query_lengths)
        view = ragged_rows_of
    of_pairs = features.without_bias_of_keys(operands)
    key_bias = key_bias_of(operands)
    gradient = jax.ShapeDtypeStruct(key.shape, settings.result_dtype or key.dtype)
    sums = jax.ShapeDtypeStruct((batch, length, heads * head_size), jnp.float32)
    out_type = [gradient, gradient]
    if _needs_logit_sums(operands, settings):
        out_type.append(jax.ShapeDtypeStruct((batch, heads, key.shape[1]), jnp.float32))
    key_gradient, value_gradient, *logit_sums, sums = launch.call(
        hopper_backward_kernel,
        (
            view(query, tile.block_q),
            view(key, SIDE_KEYS.value),
            view(operands.value, SIDE_KEYS.value),
            view(output_gradient, tile.block_q),
            query_sums_launch.cleared(operands, query_lengths, tile),
            *(lengths or (None, None)),
            order,
            launch.as_float32(operands.sigmoid_bias),
            key_bias,
            *_packing(operands, tile.block_q),
            range_scale,
            *hopper_matrices.backward_matrices(of_pairs, tile.block_q, SIDE_KEYS.value),
            length,
            key.shape[1],
            settings.scale,
        ),
        [*out_type, sums],
        (-(-key.shape[1] // PROGRAM_KEYS.value) * key.shape[2] * batch,),
        _backward_options(operands, settings, tile, key_bias),
        aliases={_SUMS: len(out_type)},
    )
    return Gradients(
        query=query_sums_launch.query_gradient(
            sums, operands, settings, query_lengths, range_scale
        ),
        key=key_gradient,
        value=value_gradient,
        bias=_of_bias_operand(operands, logit_sums, settings, output_gradient),
        sigmoid_bias=_of_bias(operands.sigmoid_bias, logit_sums, 2, settings),
        key_bias=_of_bias(operands.key_bias, logit_sums, 1, settings),
    )


def _needs_logit_sums(operands: Operands, settings: Settings) -> bool:
    """Whether the logits' gradients have to be summed up over all queries: for a bias's."""
    biases = (operands.sigmoid_bias, operands.key_bias) if settings.bias_gradients else ()
    return features.is_per_key(operands) or any(x is not None for x in biases)


def _backward_options(
    operands: Operands, settings: Settings, tile: BackwardTile, key_bias: Array | None
) -> dict[str, Any]:
    """The constants of the backward kernel, and the compiler's."""
    left, right = features.window_of(settings)
    of_pairs = features.without_bias_of_keys(operands)
    options: dict[str, Any] = {
        "BLOCK_Q": tile.block_q,
        "STAGES": tile.stages,
        "LEFT": left,
        "RIGHT": right,
        "HELPER": tile.helper,
        "KEY_AXES": key_axes(key_bias, operands),
        "BIAS_AXES": hopper_matrices.leading_axes(of_pairs.bias),
        "MASK_AXES": hopper_matrices.leading_axes(operands.mask),
        "NEIGHBOURS": hopper_matrices.neighbours(of_pairs),
    }
    if not _needs_logit_sums(operands, settings):
        options["logit_sums_ptr"] = None
    return options | options_of(operands, settings, tile.max_registers)


def _packing(operands: Operands, block_q: int) -> tuple[Array | None, ...]:
    """Segments of queries and keys, rows' bias, queries of each program; None without segments.

    Rows are as long as whole blocks. Queries past the length are 0, padding is -1 and for keys -2:
    no two of them are equal.
    """
    queries, keys = operands.query_segments, operands.key_segments
    if queries is None or keys is None:
        return (None,) * 4
    # Segments ask a portable kernel's tile for its sizes alone.
    tile = Tile(block_q, PROGRAM_KEYS.value, num_warps=4, num_stages=1)
    row_bias = None
    if operands.sigmoid_bias is None:
        row_bias = launch.packing_of(operands, tile).row_bias
    query_ids = jnp.where(queries > 0, queries, -1)
    if operands.query_lengths is not None:
        inside = jnp.arange(queries.shape[1])[None] < operands.query_lengths[:, None]
        query_ids = jnp.where(inside, query_ids, 0)
    key_ids = jnp.where(reference.valid_keys(operands), keys, -2)
    return (
        _whole_blocks(query_ids, tile.block_q, 0),
        _whole_blocks(key_ids, tile.block_k, -2),
        None if row_bias is None else _whole_blocks(row_bias, tile.block_q, 0),
        launch.query_ranges(operands, tile),
    )


def _whole_blocks(x: Array, block: int, fill: int) -> Array:
    """[B, L] with L up to a multiple of block."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)), constant_values=fill)


def _of_bias_operand(
    operands: Operands, logit_sums: list[Array], settings: Settings, output_gradient: Array
) -> Array | None:
    """The gradient of the bias, [B or 1, N or 1, 1 or T, S]; None without one."""
    bias = operands.bias
    if bias is None:
        return None
    if not features.is_per_key(operands):
        return launch.bias_gradient(operands, settings, output_gradient)
    axes = tuple(axis for axis in (0, 1) if bias.shape[axis] == 1)
    return launch.summed(logit_sums[0], bias, axes, settings)


def _of_bias(
    bias: Array | None, logit_sums: list[Array], axis: int, settings: Settings
) -> Array | None:
    if bias is None:
        return None
    return launch.summed(logit_sums[0] if logit_sums else None, bias, axis, settings)
