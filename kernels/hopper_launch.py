"""Host side of the Hopper forward kernel: schedule, grid, biases, and which tile a call has."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sigjax.kernels import features, hopper_matrices, launch
from sigjax.kernels.hopper_forward import hopper_forward_kernel
from sigjax.kernels.hopper_operands import (
    key_axes,
    key_bias_of,
    lengths_of,
    multiprocessors,
    options_of,
    ragged_rows_of,
    rows_of,
)
from sigjax.kernels.hopper_outputs import BY_ROWS, BY_TMA, FROM_REGISTERS
from sigjax.kernels.hopper_turns import ALWAYS, NEVER, WHERE_EXACT
from sigjax.kernels.hopper_weights import ADAPTIVE, PAIR, TANH
from sigjax.kernels.schedule import longest_first
from sigjax.kernels.tile_math import LOG2_E
from sigjax.kernels.tiles import SHORT, ForwardTile, hopper_forward_tile
from sigjax.operands import Operands, Settings

# Which array of the kernel counts tiles; the output comes next, where TMA stores it.
_COUNTER = 3
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
        "KEY_AXES": key_axes(key_bias, operands),
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

    Windows and packed rows without lengths never do: up to 7 % slower by it.
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


def _key_bias_of_blocks(
    operands: Operands, settings: Settings, tile: ForwardTile, *, in_scores: bool
) -> Array | None:
    """key_bias_of as the forward kernel takes it, in whole blocks of keys."""
    key_bias = key_bias_of(operands)
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


def _needs_lengths(operands: Operands, tile: ForwardTile) -> bool:
    """Whether weights have to be made 0 past a key length: what is added to them may be NaN there.

    Else keys and values arrive as zeros, and where a value is 0 no weight matters, but that of a
    query with an infinite element, which is NaN.
    """
    if lengths_of(operands) is None:
        # A bias arrives as zeros past the array; those are no codes of a mask, see hopper_matrix.
        return operands.mask is not None and operands.key.shape[1] % tile.block_k != 0
    return any(x is not None for x in (operands.bias, operands.mask, operands.key_bias))
