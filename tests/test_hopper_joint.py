"""Tiles that heads share: hopper_joint.py.

The kernel's source runs in NumPy, see emulated_hopper, one warpgroup of it slow; on a GPU it runs
itself.
"""

import functools
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sigjax import reference
from sigjax.kernels import hopper_launch
from sigjax.kernels.hopper_forward import hopper_forward_kernel
from sigjax.kernels.schedule import longest_first
from sigjax.kernels.tiles import ForwardTile, hopper_forward_tile
from sigjax.operands import Operands, Settings
from tests import emulated_hopper, ptxas
from tests.in_turn import in_turn

BLOCK = 64
SETTINGS = Settings(scale=0.1, result_dtype=np.dtype("float32"))
# Heads of queries and keys, lengths of queries and keys in the array, and of each sequence or None.
# Of 3 consumers a rest of 1 and 2 blocks and none, fewer blocks than consumers, one head, one
# query, no keys, padding alone, one past a block.
type Shape = tuple[int, int, int, int, tuple[list[int], list[int]] | None]
SHAPES: dict[str, Shape] = {
    "rest-of-1": (3, 3, 256, 300, None),
    "rest-of-2": (5, 5, 320, 130, None),
    "no-rest": (2, 1, 384, 100, None),
    "one-block": (7, 7, 60, 260, None),
    "one-head": (1, 1, 200, 100, None),
    "grouped-heads": (4, 2, 200, 300, None),
    "ragged": (3, 3, 400, 300, ([400, 40, 0, 130], [300, 100, 70, 0])),
    "ragged-grouped": (4, 2, 330, 300, ([256, 321, 65], [300, 129, 128])),
    "one-query": (7, 7, 70, 60, ([64, 1], [60, 1])),
    "padding-alone": (2, 2, 300, 200, ([0, 0], [0, 0])),
}


def operands_of(shape: Shape, head_size: int, dtype: Any) -> Operands:
    heads, key_heads, length, keys, lengths = shape
    batch = 2 if lengths is None else len(lengths[0])
    rng = np.random.default_rng(0)
    operands = Operands(
        *(
            jnp.asarray(rng.standard_normal((batch, rows, number, head_size)), dtype)
            for rows, number in ((length, heads), (keys, key_heads), (keys, key_heads))
        )
    )
    if lengths is None:
        return operands
    queries, key_lengths = (jnp.array(x, jnp.int32) for x in lengths)
    return operands._replace(query_lengths=queries, key_lengths=key_lengths)


def joint(head_size: int, weights: str) -> ForwardTile:
    """The table's tile with joint tiles; "adaptive" weights however short the sequences are."""
    tile = hopper_forward_tile(head_size, fast_sigmoid=weights == "tanh")
    tile = replace(tile, joins=True, few=0, turns_from=0)
    return tile.exact() if weights == "pair" else tile


@in_turn(
    "shape",
    SHAPES,
    head_size=(64, 64, 128),
    weights=("pair", "adaptive"),
    programs=(1, 3, 2),
    slow=(0, 1, None, 2, 3),
)
def test_outputs_are_those_of_the_definition(
    shape: Shape, head_size: int, weights: str, programs: int, slow: int | None
):
    operands = operands_of(shape, head_size, jnp.bfloat16)
    if head_size == 128 and slow == 3:
        slow = None  # there are two consumers
    got = emulated_hopper.forward(
        operands, SETTINGS, joint(head_size, weights), programs, slow=slow
    )
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, operands)
    np.testing.assert_allclose(got, reference.attention(wide, SETTINGS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [SHAPES["rest-of-2"], SHAPES["ragged"]], ids=["dense", "ragged"])
@pytest.mark.parametrize("weights", ["pair", "tanh"])
def test_a_shared_tile_changes_no_bit_of_weights_of_one_kind(shape: Shape, weights: str):
    operands = operands_of(shape, 64, jnp.bfloat16)
    tile = joint(64, weights)
    got, want = (
        emulated_hopper.forward(operands, SETTINGS, replace(tile, joins=joins))
        for joins in (True, False)
    )
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_adaptive_weights_have_the_same_bits_in_any_bucket_and_company():
    """Rows of a rest have exact ones, wherever the sequence is."""
    operands = operands_of(SHAPES["ragged"], 64, jnp.bfloat16)
    tile = joint(64, "adaptive")
    got = np.asarray(emulated_hopper.forward(operands, SETTINGS, tile))
    row, length, keys = 3, 130, 60
    got = np.asarray(
        emulated_hopper.forward(
            operands._replace(key_lengths=jnp.array([300, 100, 70, keys])), SETTINGS, tile
        )
    )[row, :length]
    alone = Operands(
        operands.query[row : row + 1, :length],
        operands.key[row : row + 1, :keys],
        operands.value[row : row + 1, :keys],
    )
    want = np.asarray(emulated_hopper.forward(alone, SETTINGS, tile))[0]
    np.testing.assert_array_equal(got, want)


@functools.cache
def module(name: str) -> Any:
    """A module of the kernel, in NumPy."""
    return emulated_hopper.Emulator().module(name)


def tiles_of(
    heads: int, length: int, consumers: int, lengths: list[tuple[int, int]] | None
) -> list[tuple[Any, ...]]:
    """tile_of of every tile, in NumPy."""
    device = module("hopper_tiles")
    tables: tuple[Any, ...] = (None,) * 4
    if lengths is not None:
        queries, keys = (jnp.array(x, jnp.int32) for x in zip(*lengths, strict=True))
        order, ends = longest_first(queries, keys, heads, length, consumers * BLOCK, BLOCK)
        tables = tuple(emulated_hopper.Pointer(np.array(x)) for x in (queries, keys, order, ends))
    batch = 2 if lengths is None else len(lengths)
    sizes = (emulated_hopper.Scalar(x) for x in (batch, length, 9))
    schedule = device.Schedule(*tables, *sizes)
    options = SimpleNamespace(
        N=heads, CONSUMERS=consumers, BLOCK_Q=BLOCK, IS_CAUSAL=False, SHARERS=0, JOINS=consumers
    )
    found, position = [], emulated_hopper.Scalar(0)
    for program in range(device.tiles_of(schedule, options)):
        tile = device.tile_of(emulated_hopper.Scalar(program), position, schedule, options)
        position = tile.position
        found.append(tile[1:])
    return found


def blocks_of(tile: tuple[Any, ...], heads: int, consumers: int) -> list[tuple[int, int, int]]:
    """(sequence, head, first query) of a tile's consumers."""
    device = module("hopper_joint")
    batch, head, start, _, _, rest = tile
    parts = (
        device.part_of(head, start, rest, heads, BLOCK, consumers, consumer)
        for consumer in range(consumers)
    )
    return [(int(batch), int(own), int(row)) for own, row in parts]


LENGTH = 7 * BLOCK + 5
pairs_of_lengths = st.tuples(st.integers(0, LENGTH), st.integers(0, 9))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 5),
    st.sampled_from([2, 3]),
    st.none() | st.lists(pairs_of_lengths, min_size=1, max_size=4),
)
def test_every_block_comes_once_and_no_consumer_is_idle(heads, consumers, lengths):
    found = tiles_of(heads, LENGTH, consumers, lengths)
    given_lengths = [(LENGTH, 9)] * 2 if lengths is None else lengths
    computed: Counter[tuple[int, int, int]] = Counter()
    padding: Counter[tuple[int, int, int]] = Counter()
    for tile in found:
        blocks = blocks_of(tile, heads, consumers)
        works = tile[4] > 0
        (computed if works else padding).update(blocks)
        if works:
            assert all(row < given_lengths[sequence][0] for sequence, _, row in blocks)
    want, empty = set(), set()
    for sequence, (queries, keys) in enumerate(given_lengths):
        used = queries if keys > 0 else 0
        for head in range(heads):
            want |= {(sequence, head, row) for row in range(0, used, BLOCK)}
            first = -(-used // BLOCK) * BLOCK
            empty |= {(sequence, head, row) for row in range(first, LENGTH, BLOCK)}
    assert computed.keys() == want
    # The last joint tile of a sequence repeats its last block.
    repeated = Counter(block[0] for block in computed.elements())
    repeated.subtract(Counter(block[0] for block in want))
    assert all(number < consumers for number in repeated.values())
    assert {block for block in padding if block[2] < LENGTH} == empty
    assert max(padding.values(), default=1) == 1


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.sampled_from([2, 3]), st.integers(1, LENGTH))
def test_a_joint_tile_says_whose_keys_it_takes(heads, consumers, length):
    device = module("hopper_joint")
    for tile in tiles_of(heads, length, consumers, None):
        _, head, _, _, _, rest = tile
        first, number = device.heads_of(head, rest, heads, consumers)
        own = {block[1] for block in blocks_of(tile, heads, consumers)}
        assert own == set(range(first, first + number))


def test_shared_tiles_cost_no_spill():
    def run(x: jax.Array) -> jax.Array:
        return hopper_launch.forward(Operands(x, x, x), Settings(scale=1.0))

    x = jax.ShapeDtypeStruct((1, 2048, 4, 64), jnp.bfloat16)
    ptxas.assert_no_spill(ptxas.ptx_of(hopper_forward_kernel, run, x))


GPU_SHAPES: dict[str, Shape] = SHAPES | {
    "dense-1024": (8, 8, 1024, 1024, None),
    "dense-2048": (8, 2, 2048, 2048, None),
    "ragged-2000": (8, 8, 2000, 2000, ([2000, 1234, 700, 65], [1999, 1234, 701, 65])),
    "cross": (8, 8, 100, 4000, ([100, 37], [4000, 2049])),
}


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["pair", "tanh"])
@pytest.mark.parametrize("head_size", [64, 128], ids=["H64", "H128"])
@pytest.mark.parametrize("shape", GPU_SHAPES.values(), ids=list(GPU_SHAPES))
def test_so_it_is_on_a_gpu(shape: Shape, head_size: int, weights: str):
    operands = operands_of(shape, head_size, jnp.bfloat16)
    tile = joint(head_size, weights)
    got = jax.jit(lambda x: hopper_launch.forward(x, SETTINGS, tile))
    want = jax.jit(lambda x: hopper_launch.forward(x, SETTINGS, replace(tile, joins=False)))
    expected = np.asarray(want(operands))
    for _ in range(20):
        np.testing.assert_array_equal(np.asarray(got(operands)), expected)
