"""The Hopper kernels' host side: that every variant compiles for sm_90, and who serves what."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.first_launch import violations
from benchmarks.tune_hopper import forward_versions
from sigjax.choice import compile_for
from sigjax.kernels import hopper_backward_launch, hopper_choice, hopper_launch, launch
from sigjax.kernels.tiles import hopper_backward_tile
from sigjax.numerics import Case
from sigjax.operands import Operands, Settings
from tests.in_turn import HEAD_SIZES, in_turn

BATCH, LENGTH, KEYS, HEADS = 2, 300, 200, 2
FORWARD, BACKWARD = "hopper_forward_kernel", "hopper_backward_kernel"
PORTABLE = ["forward_kernel", "key_value_gradient_kernel", "query_gradient_kernel"]


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both Hopper kernels serve what they can, even where they are slower."""
    monkeypatch.setenv(hopper_choice.VARIABLE, "forward,backward,narrow")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Traces a forward and a backward pass for a GPU and tells which kernels they call.

    But that of query_sums, before and after a backward kernel. With compiles, all are compiled.
    """
    names: list[str] = []
    call = launch.call

    def spy(kernel, *arguments, **options):
        names.append(kernel.__name__)
        return call(kernel, *arguments, **options)

    monkeypatch.setattr(launch, "call", spy)

    def lower(
        dtype: str = "bfloat16",
        head_size: int = 64,
        *,
        length: int = LENGTH,
        keys: int = KEYS,
        kv_heads: int = HEADS,
        capability: int = 90,
        lengths: bool = False,
        biases: bool = False,
        is_causal: bool = False,
        scale: float = 0.125,
        deterministic: bool = False,
        partial: bool = False,
        window: tuple[int, int] | None = None,
        segments: bool = False,
        backward: bool = True,
        compiles: bool = False,
    ) -> list[str]:
        def shape(*sizes: int, dtype: str = dtype) -> Any:
            return jax.ShapeDtypeStruct(sizes, dtype)

        query = shape(BATCH, length, HEADS, head_size)
        key = shape(BATCH, keys, kv_heads, head_size)
        operands = Operands(query, key, key)
        if lengths:
            operands = operands._replace(
                query_lengths=shape(BATCH, dtype="int32"), key_lengths=shape(BATCH, dtype="int32")
            )
        if biases:
            operands = operands._replace(
                sigmoid_bias=shape(BATCH, HEADS, dtype="float32"),
                key_bias=shape(BATCH, keys, dtype="float32"),
            )
        if segments:
            operands = operands._replace(
                query_segments=shape(BATCH, length, dtype="int32"),
                key_segments=shape(BATCH, keys, dtype="int32"),
            )
        settings = Settings(
            scale=scale, is_causal=is_causal, deterministic=deterministic, window=window
        )
        if partial:
            settings = replace(settings, result_dtype=np.dtype("float32"), bias_gradients=False)
            operands = operands._replace(sigmoid_bias=shape(BATCH, HEADS, dtype="float32"))

        def both(operands: Operands, gradient: jax.Array):
            output = launch.forward(operands, settings)
            if not backward:
                return output, None
            return output, launch.backward(operands, settings, gradient)

        with compile_for(capability):
            traced = jax.jit(both).trace(operands, query)
            if compiles:
                text = traced.lower(lowering_platforms=("cuda",)).as_text()
                assert text.count("triton_kernel_call") == len(names)
        # custom_partitioning, which splits the call over devices, lowers nothing with effects.
        assert not traced.jaxpr.effects
        return sorted(name for name in names if name != "query_sums_kernel")

    return lower


VARIANTS = {  # test_hopper_lengths compiles lengths alone
    "dense": {},
    "causal": {"is_causal": True},
    "causal-lengths-grouped": {"is_causal": True, "lengths": True, "kv_heads": 1},
    "float16": {"dtype": "float16", "lengths": True},
    "partial": {"lengths": True, "partial": True},
}
MANY_KEYS = {  # of few no weights are computed adaptively; backward that is all the same
    "dense": {"length": 2048, "keys": 2048},  # one of test_hopper_weights too
    "causal-lengths": {"length": 2048, "keys": 2048, "lengths": True, "is_causal": True},
}


@in_turn("options", VARIANTS, head_size=HEAD_SIZES)
def test_every_variant_compiles(head_size: int, options: dict, kernels: Callable[..., list[str]]):
    assert kernels(head_size=head_size, compiles=True, **options) == [BACKWARD, FORWARD]


@in_turn("options", MANY_KEYS, head_size=HEAD_SIZES)
def test_adaptive_weights_compile(head_size: int, options: dict, kernels: Callable[..., list[str]]):
    assert kernels(head_size=head_size, compiles=True, backward=False, **options) == [FORWARD]


SPARSE = {
    "window": {"window": (40, 25)},
    "window-causal": {"window": (40, 25), "is_causal": True},
    "window-lengths-grouped": {"window": (0, 500), "lengths": True, "kv_heads": 1},
    "segments": {"segments": True},
    "segments-lengths": {"segments": True, "lengths": True},
    "segments-causal": {"segments": True, "is_causal": True},
    "segments-partial": {"segments": True, "partial": True},
    "window-segments-biases": {"window": (40, 25), "segments": True, "biases": True},
    "float16-window": {"dtype": "float16", "window": (40, 25)},
    "float16-segments": {"dtype": "float16", "segments": True},
    "float16-window-segments": {"dtype": "float16", "window": (40, 25), "segments": True},
}


@pytest.mark.parametrize("options", SPARSE.values(), ids=list(SPARSE))
@pytest.mark.parametrize("head_size", [64, 128], ids=["H64", "H128"])
def test_window_and_segments_are_served(
    head_size: int, options: dict, kernels: Callable[..., list[str]]
):
    names = kernels(head_size=head_size, **options)
    assert {FORWARD, BACKWARD} == set(names) - {"segment_kernel"}
    assert ("segment_kernel" in names) == ("segments" in options)


# The dtypes in turn, not as cases of their own.
@in_turn(
    "options",
    {name: options for name, options in SPARSE.items() if "dtype" not in options},
    head_size=HEAD_SIZES,
    dtype=("bfloat16", "bfloat16", "float16", "float16"),
)
def test_every_variant_of_window_and_segments_compiles(
    head_size: int, dtype: str, options: dict, kernels: Callable[..., list[str]]
):
    names = kernels(dtype, head_size, compiles=True, backward=False, **options)
    assert names == [FORWARD] + ["segment_kernel"] * ("segments" in options)


@pytest.mark.parametrize("head_size", [64, 128], ids=["H64", "H128"])
def test_biases_are_served_and_backward_where_heads_are_not_grouped(
    head_size: int, kernels: Callable[..., list[str]]
):
    call = {"head_size": head_size, "biases": True, "lengths": True}
    # Those of 64 are compiled by test_hopper_key_bias, with one more bias of keys.
    assert kernels(**call, compiles=head_size == 128) == [BACKWARD, FORWARD]
    names = kernels(**call, kv_heads=1)
    assert names == sorted([BACKWARD, FORWARD, FORWARD, *PORTABLE[1:]])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "lengths", [None, ((333, 200), (1, 0), (129, 131))], ids=["full", "ragged"]
)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_size", [64, 128], ids=["H64", "H128"])
def test_gradients_of_biases_keep_the_tolerance_rule(
    head_size: int, dtype: str, is_causal: bool, lengths: Any
):
    case = Case(dtype, head_size, 333, 200, 1, is_causal, biases=True, lengths=lengths)
    assert violations(case, "triton") == []


@pytest.mark.parametrize(
    "call",
    [{"dtype": "float32"}, {"head_size": 96}, {"capability": 80}],
    ids=["float32", "H96", "sm_80"],
)
def test_other_calls_get_the_portable_kernels(call: dict, kernels: Callable[..., list[str]]):
    assert kernels(**call) == PORTABLE


@pytest.mark.parametrize(
    ("named", "expected"),
    [("", PORTABLE), ("forward", [FORWARD, *PORTABLE[1:]]), ("backward", [PORTABLE[0], BACKWARD])],
    ids=["none", "forward", "backward"],
)
def test_the_variable_restricts_the_hopper_kernels_to_the_directions_it_names(
    named: str,
    expected: list[str],
    kernels: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv(hopper_choice.VARIABLE, named)
    assert kernels() == sorted(expected)


def test_a_backward_tile_without_a_helper_is_refused_at_head_size_64():
    x = jnp.zeros((1, 64, 1, 64), jnp.bfloat16)
    tile = replace(hopper_backward_tile(64), helper=False)
    with pytest.raises(ValueError, match=r"tile\.helper must be True at head size 64, got False"):
        hopper_backward_launch.backward(Operands(x, x, x), Settings(scale=1.0), x, tile)


def test_deterministic_gradients_are_the_portable_kernels(kernels: Callable[..., list[str]]):
    assert kernels(deterministic=True) == [FORWARD, *PORTABLE[1:]]


@pytest.mark.parametrize(("version", "serves"), [("3.8.1", False), ("3.9.0", True), ("3.10", True)])
def test_an_older_triton_gets_the_portable_kernels(
    version: str, serves: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launch.triton, "__version__", version)
    x = jnp.ones((1, 8, 1, 64), jnp.bfloat16)
    with compile_for(90):
        assert hopper_choice.serves("forward", Operands(x, x, x), Settings(scale=1.0)) is serves


@pytest.mark.gpu
@pytest.mark.parametrize("logits", [1, 8], ids=lambda factor: f"x{factor}")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_size", [64, 128], ids=["H64", "H128"])
def test_every_version_gives_the_same_and_keeps_a_nan_in_its_row(
    head_size: int, dtype: str, logits: int
):
    keys = jax.random.split(jax.random.key(0), 3)
    query, key, value = (jax.random.normal(one, (1, 333, 2, head_size), dtype) for one in keys)
    query = (query * logits).at[0, 100, 1].set(jnp.nan)
    settings = Settings(scale=head_size**-0.5)
    versions = forward_versions(head_size)
    outputs = {
        name: hopper_launch.forward(Operands(query, key, value), settings, tile)
        for name, tile in versions.items()
    }
    pair = outputs.pop("pair").astype(jnp.float32)
    assert jnp.isnan(pair[0, 100, 1]).all()
    assert jnp.isnan(pair).sum() == head_size
    for name, output in outputs.items():
        # Two roundings of weights and outputs; and what tanh is off by, see test_fast_sigmoid.
        relative = 6e-2 if name.startswith("tanh") else 2**-6
        error = jnp.abs(output.astype(jnp.float32) - pair)
        assert jnp.nanmax(error) <= relative * jnp.nanmax(jnp.abs(pair)), name
        assert jnp.array_equal(jnp.isnan(output), jnp.isnan(pair)), name


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", [64, 128], ids=["H64", "H128"])
def test_deterministic_gradients_have_the_same_bits_a_thousand_times(head_size: int):
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value, gradient = (
        jax.random.normal(one, (2, 333, 2, head_size), "bfloat16") for one in keys
    )
    settings = Settings(scale=head_size**-0.5, deterministic=True)

    @jax.jit
    def differences(first: Any, query: jax.Array) -> jax.Array:
        again = launch.backward(Operands(query, key, value), settings, gradient)
        pairs = zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True)
        return jnp.array([jnp.sum(x != y) for x, y in pairs]).sum()

    first = jax.jit(launch.backward, static_argnums=1)(
        Operands(query, key, value), settings, gradient
    )
    assert sum(int(differences(first, query)) for _ in range(1000)) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [None, (333, 1, 0)], ids=["dense", "ragged"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_size", [64, 128], ids=["H64", "H128"])
def test_partial_sums_round_to_the_results(
    head_size: int, dtype: str, lengths: tuple[int, ...] | None
):
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value, gradient = (
        jax.random.normal(one, (3, 333, 2, head_size), dtype) for one in keys
    )
    operands = Operands(query, key, value)
    if lengths is not None:
        operands = operands._replace(
            query_lengths=jnp.array(lengths), key_lengths=jnp.array(lengths)
        )
    settings = Settings(scale=head_size**-0.5)
    wide = replace(settings, result_dtype=np.dtype("float32"))
    rounded = hopper_launch.forward(operands, wide).astype(dtype)
    assert jnp.array_equal(rounded, hopper_launch.forward(operands, settings))
    ours = hopper_backward_launch.backward(operands, settings, gradient)
    partial = hopper_backward_launch.backward(operands, wide, gradient)
    assert jnp.array_equal(partial.key.astype(dtype), ours.key)
    assert jnp.array_equal(partial.value.astype(dtype), ours.value)
    # Query gradients are added up in any order.
    np.testing.assert_allclose(partial.query, ours.query.astype(jnp.float32), rtol=2**-7, atol=2e-3)
    assert partial.query.dtype == partial.key.dtype == partial.value.dtype == jnp.float32
