"""Host side of the Hopper kernel for the gradient of a bias of pairs."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import jax_triton
from jax import Array

from sigjax.kernels import features, hopper_operands, launch
from sigjax.kernels.hopper_bias_gradient import (
    CONSUMERS,
    SIDE,
    TILE_KEYS,
    hopper_bias_gradient_kernel,
)
from sigjax.kernels.tile_math import LOG2_E
from sigjax.kernels.tiles import BiasTile, hopper_bias_tile
from sigjax.operands import Operands, Settings


def bias_gradient(
    operands: Operands, settings: Settings, output_gradient: Array, tile: BiasTile | None = None
) -> Array:
    """The gradient of a bias [B or 1, N or 1, T, S]; a tile other than the table's to tune."""
    query, key, bias = operands.query, operands.key, operands.bias
    if bias is None:
        msg = "bias_gradient needs operands with a bias, got None"
        raise ValueError(msg)
    batch, length, heads, head_size = query.shape
    tile = tile or hopper_bias_tile(head_size)
    lengths = hopper_operands.lengths_of(operands)
    view = hopper_operands.rows_of if lengths is None else hopper_operands.ragged_rows_of
    left, right = features.window_of(settings)
    blocks = (1, 1, CONSUMERS.value * SIDE.value, TILE_KEYS.value)
    tiles = math.prod(-(-size // block) for size, block in zip(bias.shape, blocks, strict=True))
    options: dict[str, Any] = {
        "QUERY_STAGES": tile.query_stages,
        "KEY_STAGES": tile.key_stages,
        "HELD": tile.held,
        "LEFT": left,
        "RIGHT": right,
        "AXES": (bias.shape[0] == batch, bias.shape[1] == heads),
    }
    return launch.call(
        hopper_bias_gradient_kernel,
        (
            view(query, SIDE.value),
            view(key, SIDE.value),
            view(operands.value, SIDE.value),
            view(output_gradient, SIDE.value),
            _pieces_of(bias),
            *(lengths or (None, None)),
            launch.as_float32(operands.sigmoid_bias),
            _key_bias(operands),
            batch,
            length,
            key.shape[1],
            settings.scale,
        ),
        jax.ShapeDtypeStruct(bias.shape, settings.result_dtype or bias.dtype),
        (min(hopper_operands.multiprocessors(), tiles),),
        options | hopper_operands.options_of(operands, settings, tile.max_registers),
    )


def _pieces_of(bias: Array) -> jax_triton.TensorDescriptor:
    """[B or 1, N or 1, T, S] as planes [T, S], in blocks of a piece; zeros outside."""
    planes = bias.reshape(-1, *bias.shape[2:])
    _, length, keys = planes.shape
    block = (1, SIDE.value, SIDE.value)
    return jax_triton.TensorDescriptor(
        planes, planes.shape, (length * keys, keys, 1), block,
        hopper_operands.shared_layout(block, planes),
    )  # fmt: skip


def _key_bias(operands: Operands) -> Array | None:
    """What key_bias adds to t, in rows of whole pieces."""
    if operands.key_bias is None:
        return None
    added = operands.key_bias.astype(jnp.float32) * -LOG2_E.value
    # Past the lengths pairs take no part, whatever is there.
    return jnp.pad(added, ((0, 0), (0, -added.shape[1] % SIDE.value)))
