"""Bias and mask of pairs in the Hopper forward kernel: hopper_matrix.py.

The kernel's source runs in NumPy, see emulated_hopper; its numbers are those of a GPU.
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from triton.experimental.gluon import language as gl

import sigjax
from sigjax import numerics
from sigjax.choice import compile_for
from sigjax.kernels import (
    hopper_choice,
    hopper_launch,
    hopper_matrices,
    hopper_matrix,
    launch,
)
from sigjax.kernels.hopper_forward import hopper_forward_kernel
from sigjax.kernels.hopper_tiles import ALL_SEQUENCES
from sigjax.kernels.tile_math import LOG2_E
from sigjax.kernels.tiles import ForwardTile, hopper_forward_tile
from sigjax.operands import Operands, Settings
from tests import definition, emulated_hopper, ptxas
from tests.in_turn import HEAD_SIZES, in_turn

KINDS = ["bias", "mask"]
AXES = {"BN": (True, True), "B": (True, False), "N": (False, True), "none": (False, False)}
kinds = pytest.mark.parametrize("kind", KINDS)
axes = pytest.mark.parametrize("axes", AXES.values(), ids=list(AXES))
head_sizes = pytest.mark.parametrize("head_size", [64, 128], ids=["H64", "H128"])
dtypes = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hopper kernels serve what they can, even where they are slower."""
    monkeypatch.setenv(hopper_choice.VARIABLE, "forward,backward,narrow")


@pytest.fixture
def on_gpu() -> Iterator[None]:
    """The calls of a test are the Hopper kernel's."""
    served: list[bool] = []
    serves = hopper_choice.serves

    def spy(direction: Any, *arguments: Any) -> bool:
        found = serves(direction, *arguments)
        served.append(found or direction == "backward")
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper_choice, "serves", spy)
        yield
    assert served
    assert all(served)


def tile_of(head_size: int, kind: str, name: str) -> ForwardTile:
    """A tile for a bias or mask.

    "table" is the table's, "tanh" with fast_sigmoid. "pair" and "adaptive" are weights where a bias
    or mask is in the logits, of any number of keys; "fused" are adaptive weights where a bias
    begins the scores.
    """
    assert kind in ("bias", "mask")
    if name in ("table", "tanh"):
        return hopper_forward_tile(head_size, pairs=kind, fast_sigmoid=name == "tanh")
    tile = replace(hopper_forward_tile(head_size, pairs=kind).exact(), matrix="logits")
    if name == "pair":
        return tile
    assert name in ("adaptive", "fused")
    tile = replace(tile, weights="adaptive", early=head_size == 128)
    return replace(tile, matrix="scores") if name == "fused" else tile


def weights_of_kinds(*names: str) -> pytest.MarkDecorator:
    """Tiles of these names for a bias, and for a mask those that are not of a bias alone."""
    cases = [(kind, name) for kind in KINDS for name in names if (kind, name) != ("mask", "fused")]
    return pytest.mark.parametrize(
        ("kind", "weights"), cases, ids=["-".join(case) for case in cases]
    )


def operands_of(
    kind: str, axes: tuple[bool, bool], dtype: str = "float32", *, batch: int = 2,
    length: int = 300, keys: int = 200, heads: int = 4, kv_heads: int = 2, head_size: int = 64,
    lengths: tuple[list[int], list[int]] | None = None, biases: bool = False,
) -> Any:  # fmt: skip
    """Random operands with a bias or mask that has these axes of (B, N)."""
    rng = np.random.default_rng(0)

    def normal(*shape: int, dtype: str = dtype) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    query = normal(batch, length, heads, head_size)
    key, value = (normal(batch, keys, kv_heads, head_size) for _ in range(2))
    shape = (batch if axes[0] else 1, heads if axes[1] else 1, length, keys)
    matrix = normal(*shape) if kind == "bias" else jnp.asarray(rng.random(shape) < 0.7)
    given: dict[str, Any] = {kind: matrix}
    if lengths is not None:
        given |= {"query_lengths": jnp.array(lengths[0]), "key_lengths": jnp.array(lengths[1])}
    if biases:
        given["sigmoid_bias"] = normal(batch, heads, dtype="float32")
        given["key_bias"] = normal(batch, keys, dtype="float32")
    return Operands(query, key, value, **given)


CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": ({}, {}),
    "causal": ({"keys": 304}, {"is_causal": True}),
    "ragged": ({"batch": 3, "lengths": ([300, 0, 77], [130, 200, 0])}, {}),
    "ragged-causal": ({"lengths": ([300, 77], [130, 200])}, {"is_causal": True}),
    "window": ({"biases": True}, {"window": (40, 25)}),
    "window-ragged": ({"batch": 3, "lengths": ([300, 0, 77], [130, 200, 0])}, {"window": (9, 70)}),
    "short": ({"length": 70, "keys": 520, "batch": 5}, {}),
}
emulated_calls = pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))


@in_turn("call", CALLS, axes=AXES.values())
@kinds
def test_the_source_of_the_kernel_computes_attention(
    kind: str, axes: tuple[bool, bool], call: tuple[dict, dict]
):
    operands = operands_of(kind, axes, **call[0])
    settings = Settings(scale=0.125, **call[1])
    want = definition.attention(operands, settings)
    np.testing.assert_allclose(
        emulated_hopper.forward(operands, settings), want, rtol=1e-5, atol=5e-5
    )


@head_sizes
def test_no_code_of_a_mask_is_made_of_what_lies_past_it(head_size: int):
    """There t is what the head adds alone; the code 0 would take its lowest byte four times."""
    added = np.linspace(-3, -2, 10_000, dtype=np.float32)
    lowest = (added * -LOG2_E.value).view(np.uint32) & 0xFF
    operands = operands_of("mask", (True, True), head_size=head_size)
    biases = jnp.broadcast_to(added[lowest == 0xFF][:4], (2, 4))
    operands = operands._replace(sigmoid_bias=biases)
    want = definition.attention(operands, Settings(scale=0.1))
    got = emulated_hopper.forward(operands, Settings(scale=0.1))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=5e-5)


@emulated_calls
@kinds
def test_so_it_does_with_heads_of_128(kind: str, call: tuple[dict, dict]):
    operands = operands_of(kind, (True, False), head_size=128, **call[0])
    settings = Settings(scale=0.1, **call[1])
    want = definition.attention(operands, settings)
    np.testing.assert_allclose(
        emulated_hopper.forward(operands, settings), want, rtol=1e-5, atol=5e-5
    )


@emulated_calls
@kinds
@head_sizes
def test_so_it_does_with_adaptive_weights(head_size: int, kind: str, call: tuple[dict, dict]):
    operands = operands_of(kind, (False, True), "bfloat16", head_size=head_size, **call[0])
    # Of a small scale all weights are small, of a large one they are not.
    for scale in (0.01, 1.0):
        settings = Settings(scale=scale, result_dtype=np.dtype("float32"), **call[1])
        wide = jax.tree.map(
            lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, operands
        )
        want = definition.attention(wide, settings)
        tile = tile_of(head_size, kind, "adaptive")
        got = emulated_hopper.forward(operands, settings, tile)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=5e-5)


@in_turn("call", CALLS, head_size=HEAD_SIZES)
@weights_of_kinds("table", "fused")
def test_so_it_does_wherever_they_come_in(
    kind: str, weights: str, head_size: int, call: tuple[dict, dict]
):
    operands = operands_of(kind, (True, False), "bfloat16", head_size=head_size, **call[0])
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, operands)
    tile = tile_of(head_size, kind, weights)
    # Where the scale is a power of two scores begin with a bias as it is.
    for scale in (0.01, 2.0**-7, 1.0, -0.5):
        settings = Settings(scale=scale, result_dtype=np.dtype("float32"), **call[1])
        want = definition.attention(wide, settings)
        got = emulated_hopper.forward(operands, settings, tile)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=5e-5)


@in_turn("call", CALLS, head_size=HEAD_SIZES)
def test_a_bias_is_added_to_logits_where_no_score_can_begin_with_it(
    head_size: int, call: tuple[dict, dict]
):
    operands = operands_of("bias", (False, True), head_size=head_size, **call[0])
    for scale in (0.0, 2.0**-40):
        settings = Settings(scale=scale, **call[1])
        want = definition.attention(operands, settings)
        got = emulated_hopper.forward(operands, settings)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=5e-5)


@kinds
def test_a_plain_call_is_computed_by_the_same_source(kind: str):
    operands = operands_of(kind, (True, True))._replace(bias=None, mask=None)
    settings = Settings(scale=0.125)
    want = definition.attention(operands, settings)
    np.testing.assert_allclose(
        emulated_hopper.forward(operands, settings), want, rtol=1e-5, atol=5e-5
    )


@axes
@pytest.mark.parametrize("weights", ["pair", "adaptive", "table"])
@head_sizes
def test_a_mask_may_be_beside_a_bias_per_key(head_size: int, weights: str, axes: tuple[bool, bool]):
    operands = operands_of("mask", (True, False), "bfloat16", head_size=head_size, biases=True)
    shape = (2 if axes[0] else 1, 4 if axes[1] else 1, 1, 200)
    bias = jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.bfloat16)
    operands = operands._replace(bias=bias)
    tile = tile_of(head_size, "mask", weights)
    settings = Settings(scale=0.125, result_dtype=np.dtype("float32"))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, operands)
    want = definition.attention(wide, settings)
    got = emulated_hopper.forward(operands, settings, tile)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=5e-5)


def poisoned(operands: Any) -> Any:
    """The same with NaN, or a random mask, where lengths end."""
    rng = np.random.default_rng(1)
    matrix = operands.bias if operands.mask is None else operands.mask
    rows, columns = np.indices(matrix.shape[2:])
    if operands.query_lengths is None or operands.key_lengths is None:
        return operands
    ends = np.asarray(operands.query_lengths), np.asarray(operands.key_lengths)
    outside = (rows >= ends[0][:, None, None]) | (columns >= ends[1][:, None, None])
    outside = outside[:, None]
    if operands.mask is None:
        return operands._replace(bias=jnp.where(outside, jnp.nan, operands.bias))
    noise = jnp.asarray(rng.random(operands.mask.shape) < 0.5)
    return operands._replace(mask=jnp.where(outside, noise, operands.mask))


@weights_of_kinds("table", "pair", "adaptive", "fused")
@head_sizes
def test_what_padding_holds_changes_no_emulated_bit(head_size: int, kind: str, weights: str):
    operands = operands_of(
        kind, (True, True), "bfloat16", head_size=head_size, lengths=([300, 77], [130, 200])
    )
    tile = tile_of(head_size, kind, weights)
    for scale in (0.01, 2.0**-7):
        settings = Settings(scale=scale)
        got, want = (
            np.asarray(emulated_hopper.forward(x, settings, tile))
            for x in (poisoned(operands), operands)
        )
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("weights", ["pair", "table"])
def test_excluded_pairs_are_exactly_0_whatever_their_keys_hold(weights: str):
    operands = operands_of("mask", (True, False), "bfloat16", keys=136)
    tile = tile_of(64, "mask", weights)
    excluded = np.zeros(136, bool)
    excluded[[0, 5, 6, 7, 129]] = True
    mask = ~np.broadcast_to(excluded, (2, 1, 300, 136))
    key = np.where(excluded[:, None, None], np.nan, operands.key)
    dirty = operands._replace(mask=jnp.asarray(mask), key=jnp.asarray(key))
    clean = operands._replace(mask=jnp.asarray(mask))
    settings = Settings(scale=0.125)
    got, want = (emulated_hopper.forward(x, settings, tile) for x in (dirty, clean))
    np.testing.assert_array_equal(got, want)
    nothing = operands._replace(mask=jnp.zeros_like(mask))
    assert not emulated_hopper.forward(nothing, settings, tile).any()


def shapes(
    kind: str = "bias", dtype: str = "bfloat16", matrix_dtype: Any = None, *, keys: int = 200,
    head_size: int = 64, shape: tuple[int, ...] | None = None, kv_heads: int = 2, **given: Any,
) -> Operands:  # fmt: skip
    """Shapes of a call with a matrix; shape is the matrix's."""

    def of(*sizes: int, dtype: str = dtype) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype)

    matrix_dtype = matrix_dtype or ("bool" if kind == "mask" else dtype)
    matrix = of(*(shape or (1, 2, 300, keys)), dtype=matrix_dtype)
    query, key = of(2, 300, 2, head_size), of(2, keys, kv_heads, head_size)
    for name in ("query_lengths", "key_lengths"):
        given |= {name: of(2, dtype="int32")} if given.get(name) else {}
    return Operands(query, key, key, **({kind: matrix} | given))


REFUSED = {
    "float32-bias": shapes(matrix_dtype="float32"),
    "odd-keys": shapes(keys=204),
    "per-query": shapes(shape=(1, 2, 300, 1)),
    "both": shapes(mask=jax.ShapeDtypeStruct((1, 1, 300, 200), "bool")),
    "both-per-key-segments": shapes(
        "mask", bias=jax.ShapeDtypeStruct((1, 2, 1, 200), "bfloat16"),
        query_segments=jax.ShapeDtypeStruct((2, 300), "int32"),
        key_segments=jax.ShapeDtypeStruct((2, 200), "int32"),
    ),
    "segments": shapes(
        query_segments=jax.ShapeDtypeStruct((2, 300), "int32"),
        key_segments=jax.ShapeDtypeStruct((2, 200), "int32"),
    ),
    "float32": shapes("mask", "float32"),
    "H96": shapes(head_size=96),
}  # fmt: skip


@pytest.mark.parametrize("operands", REFUSED.values(), ids=list(REFUSED))
def test_what_the_kernel_does_not_take_is_refused(operands: Operands):
    with compile_for(90):
        assert not hopper_choice.serves("forward", operands, Settings(scale=1.0))


SERVED: dict[str, tuple[Operands, dict[str, Any]]] = {
    "bias": (shapes(), {}),
    "mask": (shapes("mask"), {}),
    "prime": (shapes(keys=8 * 37), {}),
    "float16-bias": (shapes(matrix_dtype="float16"), {}),
    "float16": (shapes(dtype="float16", matrix_dtype="bfloat16"), {}),
    "float16-mask": (shapes("mask", "float16"), {}),
    "causal-grouped": (shapes(kv_heads=1), {"is_causal": True}),
    "lengths": (shapes("mask", query_lengths=True, key_lengths=True), {}),
    "lengths-causal": (shapes(query_lengths=True, key_lengths=True), {"is_causal": True}),
    "window": (shapes(), {"window": (40, 25)}),
    "window-mask-lengths": (
        shapes("mask", query_lengths=True, key_lengths=True), {"window": (40, 25)},
    ),
    "biases": (
        shapes(
            sigmoid_bias=jax.ShapeDtypeStruct((2, 2), "float32"),
            key_bias=jax.ShapeDtypeStruct((2, 200), "float32"),
        ),
        {},
    ),
    "mask-per-key": (
        shapes("mask", bias=jax.ShapeDtypeStruct((1, 2, 1, 200), "bfloat16")), {},
    ),
    "partial": (shapes("mask"), {"result_dtype": np.dtype("float32")}),
    "fast": (shapes(), {"fast_sigmoid": True}),
    "fast-mask": (shapes("mask"), {"fast_sigmoid": True}),
    "fast-float16": (shapes(dtype="float16"), {"fast_sigmoid": True}),
}  # fmt: skip


FUSED = {name: SERVED[name] for name in ("lengths-causal", "biases")}
# Besides those of test_no_register_spills: what has nothing to do with one another goes together.
COMPILED: dict[str, tuple[Operands, dict[str, Any]]] = {
    **{
        name: SERVED[name]
        for name in (
            "lengths-causal", "window-mask-lengths", "biases", "mask-per-key", "fast-mask",
            "fast-float16",
        )
    },
    "float16-bias-causal-grouped": (
        shapes(matrix_dtype="float16", kv_heads=1), {"is_causal": True},
    ),
    "float16-window": (shapes(dtype="float16", matrix_dtype="bfloat16"), {"window": (40, 25)}),
    "float16-mask-partial": (shapes("mask", "float16"), {"result_dtype": np.dtype("float32")}),
}  # fmt: skip
VARIANTS = SERVED | COMPILED


def of_head_size(operands: Operands, head_size: int) -> Operands:
    sizes: dict[str, Any] = {
        name: jax.ShapeDtypeStruct((*x.shape[:3], head_size), x.dtype)
        for name, x in operands._asdict().items()
        if name in ("query", "key", "value")
    }
    return operands._replace(**sizes)


@pytest.mark.parametrize("call", VARIANTS.values(), ids=list(VARIANTS))
@head_sizes
def test_every_variant_is_served(head_size: int, call: tuple[Operands, dict[str, Any]]):
    operands, options = call
    settings = Settings(scale=0.125, **options)
    with compile_for(90):
        assert hopper_choice.serves("forward", of_head_size(operands, head_size), settings)


@in_turn("call", COMPILED, head_size=HEAD_SIZES)
def test_every_variant_compiles(head_size: int, call: tuple[Operands, dict[str, Any]]):
    operands, options = call
    operands, settings = of_head_size(operands, head_size), Settings(scale=0.125, **options)
    with compile_for(90):
        traced = jax.jit(lambda x: launch.forward(x, settings)).trace(operands)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("triton_kernel_call") == 1


@in_turn("kind", {kind: kind for kind in KINDS}, head_size=HEAD_SIZES)
def test_adaptive_tiles_compile_too(kind: str, head_size: int):
    operands, settings = shapes(kind, head_size=head_size), Settings(scale=0.125)
    with compile_for(90):
        tile = tile_of(head_size, kind, "adaptive")
        call = partial(hopper_launch.forward, settings=settings, tile=tile)
        text = jax.jit(call).trace(operands).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("triton_kernel_call") == 1


@in_turn("call", FUSED, head_size=HEAD_SIZES)
def test_every_place_compiles(call: tuple[Operands, dict[str, Any]], head_size: int):
    operands, options = call
    operands, settings = of_head_size(operands, head_size), Settings(scale=0.1, **options)
    with compile_for(90):
        tile = tile_of(head_size, "bias", "fused")
        forward = partial(hopper_launch.forward, settings=settings, tile=tile)
        text = jax.jit(forward).trace(operands).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("triton_kernel_call") == 1


@pytest.mark.parametrize(
    ("kind", "head_size", "lengths"),
    [
        (kind, head_size, lengths)
        for kind in KINDS
        for head_size in (64, 128)
        for lengths in (False, True)
        if (kind, head_size, lengths) != ("mask", 64, True)
    ],
    ids=str,
)
def test_no_register_spills(kind: str, head_size: int, lengths: bool):
    """A mask at 64 with lengths spills 16 bytes, outside the loops over key blocks."""
    given: dict[str, Any] = {"query_lengths": True, "key_lengths": True} if lengths else {}
    operands = shapes(kind, keys=2048, head_size=head_size, **given)
    call = partial(hopper_launch.forward, settings=Settings(scale=head_size**-0.5))
    ptxas.assert_no_spill(ptxas.ptx_of(hopper_forward_kernel, call, operands))


def test_where_a_matrix_comes_in():
    def place(operands: Operands, scale: float = 0.125, **tile: Any) -> gl.constexpr:
        kind = "bias" if operands.mask is None else "mask"
        tiles = replace(tile_of(64, kind, "fused"), **tile)
        return hopper_matrices.place_of(operands, Settings(scale=scale), tiles)

    assert place(shapes()) == hopper_matrix.IN_SCALED_SCORES
    assert place(shapes(), -2.0) == hopper_matrix.IN_SCALED_SCORES
    assert place(shapes(), weights="pair") == hopper_matrix.IN_SCALED_SCORES
    # Queries times such a scale are not exact.
    assert place(shapes(), 0.1) == hopper_matrix.IN_SCORES
    assert place(shapes(dtype="float16")) == hopper_matrix.IN_SCORES
    assert place(shapes(), 0.0) == place(shapes(), 2.0**-40) == hopper_matrix.IN_LOGITS
    assert place(shapes(), matrix="logits") == hopper_matrix.IN_LOGITS
    assert place(shapes("mask")) == hopper_matrix.IN_LOGITS
    assert place(shapes()._replace(bias=None)) == hopper_matrix.IN_LOGITS


FREED = re.compile(r"\b(ldmatrix|fence\.proxy\.async|bar\.sync|mbarrier\.arrive)\b")


@pytest.mark.parametrize(("head_size", "kind"), [(64, "mask"), (128, "bias")])
def test_a_tile_was_read_before_its_buffer_is_filled_anew(head_size: int, kind: str):
    """TMA overtakes reads that are on their way; a fence of each thread waits for them."""
    operands = shapes(kind, keys=2048, head_size=head_size)

    def call(operands: Operands) -> jax.Array:
        return hopper_launch.forward(operands, Settings(scale=1.0))

    of_matrix, found = False, []
    for line in ptxas.ptx_of(hopper_forward_kernel, call, operands).splitlines():
        if ".loc" in line:
            of_matrix = "hopper_matrix.py" in line
        elif of_matrix and (match := FREED.search(line)):
            found.append(match[1])
    places = [i for i, name in enumerate(found) if name == "ldmatrix" and found[i + 1] != name]
    assert len(places) >= hopper_forward_tile(head_size).consumers
    for i in places:
        assert found[i + 1 : i + 4] == ["fence.proxy.async", "bar.sync", "mbarrier.arrive"]


SCALED = re.compile(r"\b(st\.shared|fence\.proxy\.async|bar\.sync|wgmma\.mma_async)\b")


@pytest.mark.parametrize("head_size", [64, 128], ids=["H64", "H128"])
def test_scaled_queries_are_there_for_all_warps_before_they_are_multiplied(head_size: int):
    """A product reads rows that other warps have scaled: each fences its own, then all meet."""
    operands = shapes("bias", keys=2048, head_size=head_size)
    settings = Settings(scale=0.125)  # a power of two
    tile = hopper_launch.forward_tile(operands, settings)
    assert hopper_matrices.place_of(operands, settings, tile) == hopper_matrix.IN_SCALED_SCORES

    def call(operands: Operands) -> jax.Array:
        return hopper_launch.forward(operands, settings)

    source, first = inspect.getsourcelines(hopper_matrix.scale_rows.fn)
    lines = range(first, first + len(source))
    of_rows, found = False, []
    for line in ptxas.ptx_of(hopper_forward_kernel, call, operands).splitlines():
        if ".loc" in line:
            place = re.search(r"hopper_matrix\.py:(\d+)", line)
            of_rows = place is not None and int(place[1]) in lines
        elif match := SCALED.search(line):
            found.append((match[1], of_rows))
    stores = [i for i, x in enumerate(found) if x == ("st.shared", True)]
    last = [i for i in stores if found[i + 1] != ("st.shared", True)]
    assert len(last) == tile.consumers
    for i in last:
        product = next(j for j in range(i, len(found)) if found[j][0] == "wgmma.mma_async")
        between = [name for name, _ in found[i + 1 : product]]
        assert "bar.sync" in between[between.index("fence.proxy.async") :]


def test_a_bias_and_a_mask_have_tiles_of_their_own():
    def tile(head_size: int, kind: str, dtype: str = "bfloat16", **options: Any) -> ForwardTile:
        operands = shapes(kind, dtype, keys=2048, head_size=head_size, query_lengths=True,
                          key_lengths=True)  # fmt: skip
        settings = Settings(scale=0.125, **options)
        return hopper_launch.forward_tile(operands, settings)

    for head_size in (64, 128):
        for kind, other in (("bias", "mask"), ("mask", "bias")):
            own = tile(head_size, kind)
            assert own == tile_of(head_size, kind, "table") != tile_of(head_size, other, "table")
            assert own.matrix_stages == 1
            fast = tile(head_size, kind, fast_sigmoid=True)
            assert fast == replace(own, weights="tanh", counts="lengths")
            assert tile(head_size, kind, "float16") == own.exact()
        # The same weights in any bucket and window, and of any neighbours.
        bias = tile(head_size, "bias")
        assert bias == bias.exact() == tile(head_size, "bias", window=(9, 9))
        assert bias.matrix == "scores"
        mask = tile(head_size, "mask")
        assert mask.weights == ("pair" if head_size == 64 else "adaptive")
        assert (mask.turns, mask.matrix) == ("always", "logits")
        narrow = tile(head_size, "mask", window=(9, 9))
        assert replace(narrow, counts=mask.counts) == mask.exact()


def test_who_shares_a_matrix_takes_its_tiles_at_the_same_time():
    def of(kind: str, shape: tuple[int, ...], **given: Any) -> int:
        return hopper_matrices.sharers(shapes(kind, shape=shape, **given))

    assert of("bias", (2, 2, 300, 200)) == 0
    assert of("bias", (1, 2, 300, 200)) == ALL_SEQUENCES.value
    assert of("mask", (2, 1, 300, 200)) == of("mask", (1, 1, 300, 200)) == 2
    # Sequences of unequal length have no common order of tiles.
    assert of("bias", (1, 2, 300, 200), query_lengths=True, key_lengths=True) == 0
    assert of("mask", (2, 1, 300, 200), query_lengths=True, key_lengths=True) == 2
    # Keys and values of the heads at work have to stay in the cache.
    assert of("mask", (2, 1, 300, 2**16), keys=2**16) == 1


# On a GPU: against the float64 definition.
GPU_CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": ({}, {}),
    "odd": ({"length": 777, "keys": 8 * 131}, {}),
    "cross": ({"length": 130, "keys": 2048}, {}),
    "causal": ({}, {"is_causal": True}),
    "ragged": ({"lengths": ([1033, 517], [700, 1096])}, {}),
    "ragged-causal": ({"lengths": ([1033, 517], [700, 1096])}, {"is_causal": True}),
    "window": ({}, {"local_window_size": (70, 20)}),
    "window-ragged": ({"lengths": ([1033, 517], [700, 1096])}, {"local_window_size": (200, 90)}),
    "biases": ({"biases": True}, {}),
    "grouped": ({"kv_heads": 2}, {}),
    "heads-of-keys": ({"kv_heads": 8}, {}),
}
gpu_calls = pytest.mark.parametrize("call", GPU_CALLS.values(), ids=list(GPU_CALLS))
LONG: dict[str, Any] = {"length": 1100, "keys": 1096, "heads": 8, "kv_heads": 4}


def inputs_of(kind: str, axes: tuple[bool, bool], dtype: str, **options: Any) -> dict[str, Any]:
    """Operands by the op's argument names, in NumPy."""
    operands = operands_of(kind, axes, dtype, **(LONG | options))
    names = {"query_lengths": "query_seq_lengths", "key_lengths": "key_value_seq_lengths"}
    return {
        names.get(name, name): np.asarray(x)
        for name, x in operands._asdict().items()
        if x is not None
    }


def output(inputs: dict[str, Any], **options: Any) -> np.ndarray:
    """What the kernel gives."""
    op = partial(sigjax.sigmoid_attention, implementation="triton", **options)
    return np.asarray(jax.jit(lambda inputs: op(**inputs))(inputs))


def wrong(inputs: dict[str, Any], **options: Any) -> list[str]:
    """What the output breaks of the tolerance rule."""
    wide: dict[str, Any] = {
        name: x if x.dtype.kind in "ib" else x.astype(np.float64) for name, x in inputs.items()
    }
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        plain = np.asarray(numerics.plain(**inputs, **options))
        with jax.enable_x64(True):
            exact = np.asarray(numerics.plain(**wide, **options))
    got = output(inputs, **options)
    return numerics.violations({"output": got}, {"output": exact}, {"output": plain})


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.gpu
@gpu_calls
@axes
@kinds
@dtypes
@head_sizes
def test_calls_keep_the_tolerance_rule(
    head_size: int, dtype: str, kind: str, axes: tuple[bool, bool], call: tuple[dict, dict]
):
    inputs = inputs_of(kind, axes, dtype, head_size=head_size, **call[0])
    assert wrong(inputs, **call[1]) == []


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.gpu
@dtypes
@head_sizes
def test_a_bias_may_have_the_other_dtype(head_size: int, dtype: str):
    inputs = inputs_of("bias", (False, True), dtype, head_size=head_size)
    other = "float16" if dtype == "bfloat16" else "bfloat16"
    inputs["bias"] = inputs["bias"].astype(jnp.dtype(other))
    assert wrong(inputs) == []


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [0.01, 0.125, 1.0])
@weights_of_kinds("table", "adaptive", "fused")
@head_sizes
def test_weights_are_near_one_another_in_any_tile(
    head_size: int, kind: str, weights: str, scale: float
):
    lengths = ([1033, 517], [700, 1096])
    operands = operands_of(
        kind, (True, False), "bfloat16", head_size=head_size, lengths=lengths, **LONG
    )
    settings = Settings(scale=scale)
    exact = tile_of(head_size, kind, "pair")
    pair = hopper_launch.forward(operands, settings, exact).astype(jnp.float32)
    got = hopper_launch.forward(operands, settings, tile_of(head_size, kind, weights))
    got = got.astype(jnp.float32)
    assert jnp.abs(got - pair).max() <= 2**-6 * jnp.abs(pair).max()


@weights_of_kinds("table", "pair", "adaptive", "fused", "tanh")
@pytest.mark.gpu
@dtypes
@head_sizes
def test_what_padding_holds_changes_no_bit(head_size: int, dtype: str, kind: str, weights: str):
    operands = operands_of(
        kind, (True, True), dtype, head_size=head_size, lengths=([1033, 517], [700, 1096]), **LONG
    )
    tile = tile_of(head_size, kind, weights)
    for scale in (0.01, 1.0):
        got, want = (
            np.asarray(hopper_launch.forward(x, Settings(scale=scale), tile))
            for x in (poisoned(operands), operands)
        )
        np.testing.assert_array_equal(got, want)


@weights_of_kinds("table", "pair", "adaptive", "fused", "tanh")
@pytest.mark.gpu
@head_sizes
def test_a_row_has_the_same_bits_in_any_bucket(head_size: int, kind: str, weights: str):
    small = operands_of(
        kind, (True, True), "bfloat16", head_size=head_size, **LONG | {"length": 300, "keys": 200}
    )
    lengths = jnp.array([300, 300]), jnp.array([200, 200])
    pads = {"query": 333, "key": 504, "value": 504}
    grown = {
        name: jnp.pad(x, ((0, 0), (0, pads[name]), (0, 0), (0, 0)), constant_values=9)
        for name, x in small._asdict().items()
        if name in pads
    }
    matrix = getattr(small, kind)
    grown[kind] = jnp.pad(matrix, ((0, 0), (0, 0), (0, 333), (0, 504)), constant_values=1)
    large = small._replace(**grown, query_lengths=lengths[0], key_lengths=lengths[1])
    tile = tile_of(head_size, kind, weights)
    for scale in (0.01, 1.0):
        settings = Settings(scale=scale)
        got, want = (np.asarray(hopper_launch.forward(x, settings, tile)) for x in (large, small))
        np.testing.assert_array_equal(got[:, :300], want)
        assert not got[:, 300:].any()


@weights_of_kinds("table", "pair", "adaptive", "fused", "tanh")
@pytest.mark.gpu
@dtypes
@head_sizes
def test_what_is_excluded_adds_exactly_0(head_size: int, dtype: str, kind: str, weights: str):
    operands = operands_of(kind, (True, True), dtype, head_size=head_size, **LONG)
    rows = jnp.arange(LONG["length"])[None, None, :, None] % 5 == 0
    if kind == "mask":
        operands = operands._replace(mask=operands.mask & ~rows)
    else:
        operands = operands._replace(bias=jnp.where(rows, -jnp.inf, operands.bias))
    tile = tile_of(head_size, kind, weights)
    got = np.asarray(hopper_launch.forward(operands, Settings(scale=0.3), tile))
    assert not got[:, ::5].any()
    assert np.isfinite(got).all()
    assert got[:, 1::5].any()


@pytest.mark.gpu
@dtypes
@head_sizes
def test_a_key_that_is_masked_may_be_nan(head_size: int, dtype: str):
    operands = operands_of("mask", (True, False), dtype, head_size=head_size, **LONG)
    excluded = np.zeros(LONG["keys"], bool)
    excluded[[0, 5, 6, 7, 129, 1000]] = True
    operands = operands._replace(mask=operands.mask & ~jnp.asarray(excluded)[None, None, None])
    key = jnp.where(excluded[:, None, None], jnp.nan, operands.key)
    settings = Settings(scale=0.125)
    got, want = (hopper_launch.forward(x, settings) for x in (operands._replace(key=key), operands))
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.gpu
@kinds
@dtypes
@head_sizes
def test_partial_sums_round_to_the_output(head_size: int, dtype: str, kind: str):
    operands = operands_of(kind, (True, False), dtype, head_size=head_size, **LONG)
    narrow = Settings(scale=0.125)
    wide = replace(narrow, result_dtype=np.dtype("float32"))
    rounded = launch.forward(operands, wide).astype(dtype)
    assert jnp.array_equal(rounded, launch.forward(operands, narrow))
