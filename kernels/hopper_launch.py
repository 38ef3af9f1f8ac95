"""Host side of the Hopper kernels: TMA views of the operands, schedules, grids."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import jax_triton
from jax import Array
from triton.experimental.gluon import language as gl

from sigjax import reference
from sigjax.kernels import (
    features,
    hopper_matrices,
    jax_triton_compat,
    launch,
    query_sums_launch,
)
from sigjax.kernels.hopper_backward import hopper_backward_kernel
from sigjax.kernels.hopper_backward_pairs import PROGRAM_KEYS
from sigjax.kernels.hopper_biases import SIDE_KEYS
from sigjax.kernels.hopper_forward import hopper_forward_kernel
from sigjax.kernels.hopper_math import RAGGED
from sigjax.kernels.hopper_outputs import BY_ROWS, BY_TMA, FROM_REGISTERS
from sigjax.kernels.hopper_turns import ALWAYS, NEVER, WHERE_EXACT
from sigjax.kernels.hopper_weights import ADAPTIVE, PAIR, TANH
from sigjax.kernels.schedule import longest_first, order_of
from sigjax.kernels.tile_math import LOG2_E
from sigjax.kernels.tiles import (
    SHORT,
    BackwardTile,
    ForwardTile,
    Tile,
    hopper_backward_tile,
    hopper_forward_tile,
)
from sigjax.operands import Gradients, Operands, Settings

jax_triton_compat.install()

# Streaming multiprocessors of an H100 SXM, for lowering without a GPU.
MULTIPROCESSORS = 132

# Which array of the forward kernel counts tiles; the output comes next, where TMA stores it.
_COUNTER = 3
# Which operand of the backward kernel are the sums that it adds to.
_SUMS = 4
_WEIGHTS = {"pair": PAIR, "adaptive": ADAPTIVE, "tanh": TANH}
_TURNS = {"never": NEVER, "always": ALWAYS, "exact": WHERE_EXACT}
_OUTPUTS = {"rows": BY_ROWS, "tma": BY_TMA, "registers": FROM_REGISTERS}


def forward(operands: Operands, settings: Settings, tile: ForwardTile | None = None) -> Array:
    """The output [B, T, N, H]; a tile other than the table's to tune."""
    query, key = operands.query, operands.key
    batch, length, heads, _ = query.shape
    tile = for_call(tile or forward_tile(operands, settings), operands, settings)
    rows = tile.consumers * tile.block_q
    tiles = -(-length // rows)
    lengths = lengths_of(operands)
    order = ends = None
    view = rows_of
    if lengths is not None:
        order, ends = longest_first(*lengths, heads, tiles, rows)
        view = ragged_rows_of
    packing = launch.packing_of(operands, tile)
    of_pairs = features.without_bias_of_keys(operands)
    in_scores = hopper_matrices.scores_begin_with_bias_of_keys(of_pairs, settings, tile)
    key_bias = _key_bias_of_blocks(operands, settings, tile, in_scores=in_scores)
    result = jax.ShapeDtypeStruct(query.shape, settings.result_dtype or query.dtype)
    if result.dtype != query.dtype:
        tile = replace(tile, output="registers")
    counter = jnp.zeros(1, jnp.int32) if takes_by_counter(tile, operands, settings) else None
    output = jax.lax.empty(result.shape, result.dtype) if tile.output == "tma" else None
    out_type, aliases = _outputs(result, counter, output)
    return launch.call(
        hopper_forward_kernel,
        (
            # Rows past the length arrive as zeros: what they hold must not decide how the
            # weights of the others are computed.
            view(query, tile.block_q),
            view(key, tile.block_k),
            view(operands.value, tile.block_k),
            counter,
            None if output is None else rows_of(output, tile.block_q),
            hopper_matrices.forward_matrix(of_pairs, settings, tile),
            *(lengths or (None, None)),
            order,
            ends,
            launch.as_float32(operands.sigmoid_bias),
            None if in_scores else key_bias,
            key_bias if in_scores else None,
            operands.query_segments,
            operands.key_segments,
            packing.row_bias,
            packing.ranges,
            batch,
            length,
            key.shape[1],
            settings.scale,
        ),
        out_type,
        (min(multiprocessors(), tiles * heads * batch),),
        _forward_options(operands, settings, tile, key_bias),
        aliases=aliases,
    )[0]


def _outputs(
    result: jax.ShapeDtypeStruct, counter: Array | None, output: Array | None
) -> tuple[list[jax.ShapeDtypeStruct], dict[int, int]]:
    """The types of what the forward kernel writes, and which arrays it writes in place.

    That is the output where TMA stores it, and the counter.
    """
    out_type, aliases = [result], dict[int, int]()
    if counter is not None:
        out_type.append(jax.ShapeDtypeStruct(counter.shape, counter.dtype))
        aliases[_COUNTER] = 1
    if output is not None:
        aliases = {_COUNTER + len(aliases): 0} | aliases
    return out_type, aliases


def _forward_options(
    operands: Operands, settings: Settings, tile: ForwardTile, key_bias: Array | None
) -> dict[str, Any]:
    """The constants of the forward kernel, and the compiler's."""
    left, right = features.window_of(settings)
    packed = operands.query_segments is not None
    of_pairs = features.without_bias_of_keys(operands)
    options: dict[str, Any] = {
        "BLOCK_Q": tile.block_q,
        "BLOCK_K": tile.block_k,
        "STAGES": tile.stages,
        "QUERY_STAGES": tile.query_stages,
        "MATRIX_STAGES": tile.matrix_stages,
        "CONSUMERS": tile.consumers,
        "TURNS": _turns(tile, packed=packed, in_window=left is not None).value,
        "REGISTERS": tile.registers,
        "WEIGHTS": _WEIGHTS[tile.weights].value,
        "EARLY": tile.early,
        "FEW": tile.few,
        "DEVIATIONS": (tile.deviations, tile.deviations_of_many),
        "KEY_AXES": _key_axes(key_bias, operands),
        "OUTPUT": _OUTPUTS[tile.output].value,
        "MATRIX": hopper_matrices.place_of(of_pairs, settings, tile).value,
        "IS_CAUSAL": settings.is_causal,
        "LEFT": left,
        "RIGHT": right,
        "MASKED": (left, right) != (None, None) or packed or _needs_lengths(operands, tile),
        "MATRIX_AXES": hopper_matrices.axes_of_matrix(of_pairs),
        "SHARERS": hopper_matrices.sharers(of_pairs),
    }
    if tile.output == "tma":
        options["output_ptr"] = None
    return options | options_of(operands, settings, tile.max_registers)


def forward_tile(operands: Operands, settings: Settings) -> ForwardTile:
    """The table's tile for these operands: with a bias per key its weights are exact.

    Learned biases spread the logits, and where some blocks have large weights and some have none
    adaptive ones are slower: 369 TFLOPS for 455 at 64, T = 4,096, of biases as large as logits.
    """
    rows = max(operands.query.shape[1], operands.key.shape[1])
    tile = hopper_forward_tile(
        operands.query.shape[-1],
        fast_sigmoid=settings.fast_sigmoid,
        pairs=features.pairs_of(features.without_bias_of_keys(operands)),
        short=rows < SHORT and settings.window is None,
    )
    has_key_bias = operands.key_bias is not None or features.is_per_key(operands)
    if tile.weights == "adaptive" and has_key_bias:
        tile = tile.exact()
    return for_call(tile, operands, settings)


def for_call(tile: ForwardTile, operands: Operands, settings: Settings) -> ForwardTile:
    """A tile as the kernel takes it for these operands.

    Adaptive weights are for bfloat16, and for logits that grow with scores.
    """
    if operands.query.dtype != jnp.bfloat16 or settings.scale <= 0:
        tile = tile.exact() if tile.weights == "adaptive" else tile
    return tile.for_keys(operands.key.shape[1], window=features.keys_of_window(settings))


def takes_by_counter(tile: ForwardTile, operands: Operands, settings: Settings) -> bool:
    """Whether programs take the next tile that nobody has, as ForwardTile.counts says.

    Windows and packed rows without lengths never do: 1 to 7 % slower by it.
    """
    if operands.query_lengths is not None or operands.key_lengths is not None:
        return tile.counts != "never"
    if settings.window is not None or operands.query_segments is not None:
        return False
    return tile.counts == "causal" or (tile.counts == "dense" and not settings.is_causal)


def _turns(tile: ForwardTile, *, packed: bool, in_window: bool) -> Any:
    """When consumers take turns: "exact" is for adaptive weights of keys that all of them share."""
    if tile.turns == "exact" and (tile.weights != "adaptive" or packed or in_window):
        return NEVER
    return _TURNS[tile.turns]


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
    key_bias = _key_bias(operands)
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
        "KEY_AXES": _key_axes(key_bias, operands),
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


def _key_bias(operands: Operands) -> Array | None:
    """What is added per key, [B or 1, N or 1, S] float32: key_bias and a bias of keys alone."""
    key_bias = launch.as_float32(operands.key_bias)
    if key_bias is not None:
        key_bias = key_bias[:, None]
    if operands.bias is None or not features.is_per_key(operands):
        return key_bias
    bias = operands.bias.astype(jnp.float32)[:, :, 0]
    return bias if key_bias is None else bias + key_bias


def _key_bias_of_blocks(
    operands: Operands, settings: Settings, tile: ForwardTile, *, in_scores: bool
) -> Array | None:
    """_key_bias as the forward kernel takes it, in whole blocks of keys."""
    key_bias = _key_bias(operands)
    if key_bias is None:
        return None
    # To half a logit, or to minus its logarithm to base 2.
    factor = 0.5 if tile.weights == "tanh" else -LOG2_E.value
    if in_scores:
        factor = 1 / settings.scale
    blocks = jnp.pad(key_bias * factor, ((0, 0), (0, 0), (0, -key_bias.shape[2] % tile.block_k)))
    return _for_scores(blocks) if in_scores else blocks


def _for_scores(key_bias: Array) -> Array:
    """[.., .., keys] as hopper_math.begun_with_keys takes it, each pair of keys twice."""
    sequences, heads, keys = key_bias.shape
    pairs = key_bias.reshape(sequences, heads, keys // 2, 1, 2)
    twice = jnp.broadcast_to(pairs, (sequences, heads, keys // 2, 2, 2))
    return twice.reshape(sequences, heads, 2 * keys)


def _key_axes(key_bias: Array | None, operands: Operands) -> tuple[bool, bool] | None:
    """Whether what _key_bias gives has an axis of sequences, and one of heads."""
    if key_bias is None:
        return None
    batch, _, heads, _ = operands.query.shape
    return key_bias.shape[0] == batch, key_bias.shape[1] == heads


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


def _needs_lengths(operands: Operands, tile: ForwardTile) -> bool:
    """Whether weights have to be made 0 past a key length: what is added to them may be NaN there.

    Else keys and values arrive as zeros, and where a value is 0 no weight matters, but that of a
    query with an infinite element, which is NaN.
    """
    if lengths_of(operands) is None:
        # A bias arrives as zeros past the array; those are no codes of a mask, see hopper_matrix.
        return operands.mask is not None and operands.key.shape[1] % tile.block_k != 0
    return any(x is not None for x in (operands.bias, operands.mask, operands.key_bias))


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
