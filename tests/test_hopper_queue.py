"""Tiles that programs take by a counter: hopper_queue.py.

The kernel's source runs in NumPy, see emulated_hopper, one warpgroup of it slow.
"""

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigjax.kernels import hopper_launch
from sigjax.kernels.hopper_forward import hopper_forward_kernel
from sigjax.kernels.tiles import Counts, hopper_forward_tile
from sigjax.operands import Operands, Settings
from tests import definition, emulated_hopper, ptxas
from tests.in_turn import in_turn

HEAD_SIZES = {"H64": 64, "H128": 128}
type Case = tuple[list[int], list[int], dict[str, Any]]
CASES: dict[str, Case] = {
    "ragged": ([300, 40, 0, 130], [300, 100, 70, 0], {}),
    "causal": ([300, 40, 77, 130], [300, 100, 128, 0], {"is_causal": True}),
    "one-tile-each": ([60, 1, 64], [1, 128, 129], {}),
    "padding-alone": ([0, 0], [0, 0], {}),
    "one-sequence": ([200], [300], {}),
    "dense": ([200, 200], [300, 300], {}),
    "dense-causal": ([300, 300], [300, 300], {"is_causal": True}),
}


def operands_of(name: str, case: Case, head_size: int, dtype: Any) -> Operands:
    """Operands of so many queries and keys, with lengths but where the name says "dense"."""
    queries, keys, _ = case
    rng = np.random.default_rng(0)
    length, columns = max(*queries, 200), max(*keys, 200)
    operands = Operands(
        *(
            jnp.asarray(rng.standard_normal((len(queries), rows, 3, head_size)), dtype)
            for rows in (length, columns, columns)
        )
    )
    if name.startswith("dense"):
        return operands
    lengths = [jnp.array(x, jnp.int32) for x in (queries, keys)]
    return operands._replace(query_lengths=lengths[0], key_lengths=lengths[1])


@in_turn(
    "name",
    {name: name for name in CASES},
    head_size=(64, 128),
    programs=(1, 3, 2),
    slow=(0, 1, None, 2),
    adaptive=(True, False),
)
def test_who_takes_a_tile_changes_no_bit(
    name: str,
    head_size: int,
    programs: int,
    slow: int | None,
    adaptive: bool,
):
    operands = operands_of(name, CASES[name], head_size, jnp.bfloat16)
    settings = Settings(scale=0.1, result_dtype=np.dtype("float32"), **CASES[name][2])
    tile = replace(hopper_forward_tile(head_size), few=0, counts="causal")
    tile = tile if adaptive else tile.exact()
    assert hopper_launch.takes_by_counter(tile, operands, settings)
    got = emulated_hopper.forward(operands, settings, tile, programs, slow=slow)
    every_so_many = replace(tile, counts="never")
    want = emulated_hopper.forward(operands, settings, every_so_many, programs=2)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, operands)
    np.testing.assert_allclose(got, definition.attention(wide, settings), rtol=1e-4, atol=1e-4)


CALLS: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "dense": ({}, {}, {"dense", "causal"}),
    "causal": ({}, {"is_causal": True}, {"causal"}),
    "lengths": ({"query_lengths": [3]}, {}, {"lengths", "dense", "causal"}),
    "window": ({}, {"window": (3, 4)}, set()),
    "window-lengths": ({"key_lengths": [3]}, {"window": (3, 4)}, {"lengths", "dense", "causal"}),
    "segments": ({"query_segments": [[1]], "key_segments": [[1]]}, {}, set()),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_the_tile_says_which_calls_take_tiles_by_a_counter(
    call: tuple[dict[str, Any], dict[str, Any], set[str]],
):
    x = jnp.zeros((1, 4, 1, 64))
    given = {name: jnp.array(values) for name, values in call[0].items()}
    operands, settings = Operands(x, x, x, **given), Settings(scale=1.0, **call[1])
    names: tuple[Counts, ...] = ("never", "lengths", "dense", "causal")
    tiles = {name: replace(hopper_forward_tile(64), counts=name) for name in names}
    counting = {x for x in names if hopper_launch.takes_by_counter(tiles[x], operands, settings)}
    assert counting == call[2]


OPS = re.compile(r"\b(atom|mbarrier\.try_wait|mbarrier\.arrive|st\.shared|ld\.shared|bar\.sync)\b")


def test_all_threads_meet_between_a_number_and_its_barrier():
    """Each stores or loads it, and one arrives for all, which racecheck reports: sanitize.txt."""
    x = jax.ShapeDtypeStruct((4, 1024, 2, 128), jnp.bfloat16)
    lengths = jax.ShapeDtypeStruct((4,), jnp.int32)

    def run(x: jax.Array, lengths: jax.Array) -> jax.Array:
        operands = Operands(x, x, x, query_lengths=lengths, key_lengths=lengths)
        return hopper_launch.forward(operands, Settings(scale=1.0))

    # What follows a line's .loc is of that line.
    of_queue, found = False, []
    for line in ptxas.ptx_of(hopper_forward_kernel, run, x, lengths).splitlines():
        if ".loc" in line:
            of_queue = "hopper_queue.py" in line
        elif of_queue and (match := OPS.search(line)):
            found.append(match[1])
    told = ["mbarrier.try_wait", "st.shared", "bar.sync", "mbarrier.arrive"]
    heard = ["mbarrier.try_wait", "ld.shared", "bar.sync", "mbarrier.arrive"]
    start = found.index("atom")
    # The atomic's own thread tells the others of its producer first.
    assert found[start : start + 8] == ["atom", "st.shared", "bar.sync", "ld.shared", *told]
    consumers = found[:start] + found[start + 8 :]
    assert len(consumers) > 0
    assert consumers == heard * (len(consumers) // 4)


@pytest.mark.gpu
@pytest.mark.parametrize("has_lengths", [False, True], ids=["dense", "lengths"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_size", HEAD_SIZES.values(), ids=list(HEAD_SIZES))
def test_so_it_is_on_a_gpu_whoever_is_first(head_size: int, is_causal: bool, has_lengths: bool):
    rng = np.random.default_rng(0)
    lengths = jnp.asarray(rng.integers(0, 3000, 24), jnp.int32)
    seeds = jax.random.split(jax.random.key(0), 3)
    query, key, value = (
        jax.random.normal(seed, (24, 3000, 8, head_size), jnp.bfloat16) for seed in seeds
    )
    operands = Operands(query, key, value)
    if has_lengths:
        operands = operands._replace(query_lengths=lengths, key_lengths=lengths)
    settings = Settings(scale=head_size**-0.5, is_causal=is_causal)
    tile = replace(hopper_launch.forward_tile(operands, settings), counts="causal")
    want = hopper_launch.forward(operands, settings, replace(tile, counts="never"))
    counted = jax.jit(lambda operands: hopper_launch.forward(operands, settings, tile))
    for _ in range(50):
        assert jnp.array_equal(counted(operands), want)


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", HEAD_SIZES.values(), ids=list(HEAD_SIZES))
def test_each_turn_of_a_loop_counts_from_0(head_size: int):
    """XLA may take the zeros out of a loop; what a kernel has counted up is not what they are."""
    x = jax.random.normal(jax.random.key(0), (4, 2048, 8, head_size), jnp.bfloat16)
    settings = Settings(scale=head_size**-0.5)
    tile = hopper_launch.forward_tile(Operands(x, x, x), settings)
    assert hopper_launch.takes_by_counter(tile, Operands(x, x, x), settings)

    def layer(x: jax.Array, counts: Counts) -> jax.Array:
        return hopper_launch.forward(Operands(x, x, x), settings, replace(tile, counts=counts))

    def step(x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        y = layer(x, tile.counts)
        return y, y

    _, looped = jax.jit(lambda x: jax.lax.scan(step, x, length=4))(x)
    want = x
    for got in looped:
        want = layer(want, "never")
        assert jnp.array_equal(got, want)
