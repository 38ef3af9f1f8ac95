"""What all Hopper kernels are given: TMA views of operands, lengths, a bias per key, options."""

from typing import Any

import jax
import jax.numpy as jnp
import jax_triton
from jax import Array
from triton.experimental.gluon import language as gl

from sigjax.kernels import features, jax_triton_compat, launch
from sigjax.kernels.hopper_math import RAGGED
from sigjax.operands import Operands, Settings

jax_triton_compat.install()

# Streaming multiprocessors of an H100 SXM, for lowering without a GPU.
MULTIPROCESSORS = 132


def lengths_of(operands: Operands) -> tuple[Array, Array] | None:
    """Query and key lengths, both or none, within the arrays."""
    if operands.query_lengths is None and operands.key_lengths is None:
        return None
    batch, length = operands.query.shape[:2]
    keys = operands.key.shape[1]

    def clipped(lengths: Array | None, full: int) -> Array:
        if lengths is None:
            return jnp.full(batch, full, jnp.int32)
        return jnp.clip(lengths, 0, full)

    return clipped(operands.query_lengths, length), clipped(operands.key_lengths, keys)


def rows_of(x: Array, rows: int) -> jax_triton.TensorDescriptor:
    """[B, L, N, H] as [B, L, N * H], in blocks of rows of one head; zeros from L on."""
    batch, length, heads, head_size = x.shape
    width = heads * head_size
    return jax_triton.TensorDescriptor(
        x,
        (batch, length, width),
        (length * width, width, 1),
        (1, rows, head_size),
        shared_layout((1, rows, head_size), x),
    )


def ragged_rows_of(x: Array, rows: int) -> jax_triton.TensorDescriptor:
    """[B, L, N, H] as rows with an end that each copy chooses, see hopper_math.copy_rows.

    Coordinates (2^30, end, 2^30 - end + row, column) address row of the flat [B * L, N * H]: the
    first two strides are such that 2^30 of each cancel modulo 2^64 bytes, and the third axis,
    2^30 long, ends at end. What lies past it arrives as zeros. After triton.tools.ragged_tma.
    """
    width = x.shape[2] * x.shape[3]
    block = (1, 1, rows, x.shape[3])
    return jax_triton.TensorDescriptor(
        x,
        (2**31 - 2**16, 2**31 - 2**16, RAGGED.value, width),
        (2**34 - width, width, width, 1),
        block,
        shared_layout(block, x),
    )


def shared_layout(block: tuple[int, ...], x: Array) -> Any:
    dtype = gl.bfloat16 if x.dtype == jnp.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for(list(block), dtype)


def key_bias_of(operands: Operands) -> Array | None:
    """What is added per key, [B or 1, N or 1, S] float32: key_bias and a bias of keys alone."""
    key_bias = launch.as_float32(operands.key_bias)
    if key_bias is not None:
        key_bias = key_bias[:, None]
    if operands.bias is None or not features.is_per_key(operands):
        return key_bias
    bias = operands.bias.astype(jnp.float32)[:, :, 0]
    return bias if key_bias is None else bias + key_bias


def key_axes(key_bias: Array | None, operands: Operands) -> tuple[bool, bool] | None:
    """Whether what key_bias_of gives has an axis of sequences, and one of heads."""
    if key_bias is None:
        return None
    batch, _, heads, _ = operands.query.shape
    return key_bias.shape[0] == batch, key_bias.shape[1] == heads


def options_of(operands: Operands, settings: Settings, max_registers: int) -> dict[str, Any]:
    heads, head_size = operands.query.shape[2:]
    return {
        "N": heads,
        "K": operands.key.shape[2],
        "H": head_size,
        "num_warps": 4,
    } | launch.compiler_options(maxnreg=max_registers)


def multiprocessors() -> int:
    device = jax.devices()[0]
    return getattr(device, "core_count", None) or MULTIPROCESSORS
