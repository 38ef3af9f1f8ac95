"""explain says what runs and why nothing faster does."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import sigjax
from sigjax.choice import compile_for

X = jax.ShapeDtypeStruct((2, 300, 4, 64), jnp.bfloat16)
SMALL = jax.ShapeDtypeStruct((2, 300, 4, 8), jnp.bfloat16)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what a host without a GPU answers")
def test_a_host_without_a_gpu_says_so():
    explanation = sigjax.explain(X, X, X)
    assert explanation.implementation == "xla"
    assert explanation.reason is not None
    assert "no NVIDIA GPU" in explanation.reason
    assert explanation.kernels == (("scan", "512 keys a step"),)


def test_an_implementation_that_was_asked_for_is_the_reason():
    with compile_for(90):
        explanation = sigjax.explain(X, X, X, implementation="xla")
    assert explanation.reason == "implementation 'xla' was asked for"


def test_a_shape_that_the_kernels_do_not_take_is_the_reason():
    with compile_for(90):
        explanation = sigjax.explain(SMALL, SMALL, SMALL)
    assert explanation.implementation == "xla"
    assert "head sizes 16 to 256, got 8" in str(explanation)


def test_the_kernels_of_a_gpu_are_named_with_their_tiles(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SIGJAX_HOPPER", raising=False)
    with compile_for(80):
        explanation = sigjax.explain(X, X, X, sigmoid_bias=-2.0)
    assert explanation.implementation == "triton"
    assert [name for name, _ in explanation.kernels] == [
        "forward",
        "query_gradient",
        "key_value_gradient",
    ]
    assert all("block_q=" in tile for _, tile in explanation.kernels)
    assert explanation.reason is None


def test_a_hopper_gpu_takes_its_own_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SIGJAX_HOPPER", raising=False)
    with compile_for(90):
        explanation = sigjax.explain(X, X, X)
    assert [name for name, _ in explanation.kernels] == ["hopper forward", "hopper backward"]
    assert explanation.reason is None


@pytest.mark.parametrize(
    ("queries", "keys", "options", "consumers"),
    [
        (767, 767, {}, 2),
        (100, 767, {"is_causal": True}, 2),
        (768, 768, {}, 3),
        (769, 769, {}, 3),
        (767, 768, {}, 3),
        (768, 767, {}, 3),
        (100, 4096, {}, 3),
        (4096, 100, {}, 3),
        (300, 300, {"fast_sigmoid": True}, 3),
    ],
)
def test_few_queries_and_keys_have_a_tile_of_their_own(
    queries: int, keys: int, options: dict[str, Any], consumers: int,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.delenv("SIGJAX_HOPPER", raising=False)
    query, key = (jax.ShapeDtypeStruct((2, x, 4, 64), jnp.bfloat16) for x in (queries, keys))
    with compile_for(90):
        explanation = sigjax.explain(query, key, key, **options)
    name, tile = explanation.kernels[0]
    assert name == "hopper forward"
    assert f"consumers={consumers}" in tile


def test_a_hopper_gpu_without_its_kernels_says_why(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SIGJAX_HOPPER", raising=False)
    with compile_for(90):
        explanation = sigjax.explain(X, X, X, deterministic=True)
    assert explanation.kernels[0][0] == "hopper forward"
    assert "backward neither gradients of grouped heads' biases nor" in str(explanation)


SPARSE: dict[str, dict[str, Any]] = {
    "window": {"local_window_size": 9},
    "wide window": {"local_window_size": 2500},
    "segments": dict.fromkeys(
        ("query_segment_ids", "key_value_segment_ids"), jax.ShapeDtypeStruct((2, 2048), jnp.int32)
    ),
}


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("head_size", [64, 128], ids=["H64", "H128"])
def test_window_and_segments_are_hoppers_where_it_is_faster(
    head_size: int, name: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("SIGJAX_HOPPER", raising=False)
    x = jax.ShapeDtypeStruct((2, 2048, 4, head_size), jnp.bfloat16)
    with compile_for(90):
        explanation = sigjax.explain(x, x, x, **SPARSE[name])
    names, tiles = zip(*explanation.kernels, strict=True)
    if head_size == 64 and name != "wide window":
        assert names == ("forward", "hopper backward")
        assert "(the portable kernel is faster)" in str(explanation.reason)
    else:
        assert names == ("hopper forward", "hopper backward")
        # Packed sequences do not decide how each other's weights are computed, and of a narrow
        # window's few keys there is nothing to choose.
        assert ("adaptive" in tiles[0]) == (name == "wide window")
        assert explanation.reason is None


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("bias", "bfloat16"), ("bias", "float16"), ("mask", "bool")],
    ids=["bfloat16", "float16", "mask"],
)
def test_bias_and_mask_of_pairs_are_hoppers(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SIGJAX_HOPPER", raising=False)
    x = jax.ShapeDtypeStruct((2, 2048, 4, 64), jnp.bfloat16)
    matrix: Any = {name: jax.ShapeDtypeStruct((1, 4, 2048, 2048), dtype)}
    with compile_for(90):
        explanation = sigjax.explain(x, x, x, **matrix)
    names, tiles = zip(*explanation.kernels, strict=True)
    own = ("hopper bias_gradient",) * (name == "bias")
    assert names == ("hopper forward", "hopper backward", *own)
    assert "matrix_stages=1" in tiles[0]
    assert f"matrix='{'scores' if name == 'bias' else 'logits'}'" in tiles[0]
    assert explanation.reason is None


def test_a_float32_bias_of_pairs_is_the_portable_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SIGJAX_HOPPER", raising=False)
    x = jax.ShapeDtypeStruct((2, 2048, 4, 64), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((1, 4, 2048, 2048), jnp.float32)
    with compile_for(90):
        explanation = sigjax.explain(x, x, x, bias)
    names = [name for name, _ in explanation.kernels]
    assert names == ["forward", "query_gradient", "key_value_gradient", "bias_gradient"]
    assert "a mask or a 16-bit bias with a number for each pair, where 8 divides S" in str(
        explanation
    )


def test_weights_of_few_keys_are_not_computed_adaptively():
    with compile_for(90):
        few, many = (
            dict(sigjax.explain(x, x, x).kernels)["hopper forward"]
            for x in (jax.ShapeDtypeStruct((2, keys, 4, 64), jnp.bfloat16) for keys in (300, 2048))
        )
    assert "'pair'" in few
    assert "'adaptive'" in many


@pytest.mark.parametrize(
    ("shape", "own"),
    [((1, 1, 300, 300), ["bias_gradient"]), ((1, 1, 1, 300), [])],
    ids=["NTS", "NS"],
)
def test_a_bias_has_its_own_tiles_and_where_it_differs_by_query_a_kernel(
    shape: tuple[int, ...], own: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SIGJAX_HOPPER", "")
    bias = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    with compile_for(90):
        kernels = dict(sigjax.explain(X, X, X, bias).kernels)
        plain = dict(sigjax.explain(X, X, X, deterministic=True).kernels)
    assert list(kernels) == ["forward", "query_gradient", "key_value_gradient", *own]
    assert (kernels["query_gradient"] != plain["query_gradient"]) == bool(own)


ARGUMENTS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "arrays": ((jnp.ones((2, 9, 4, 16)),) * 3, {"query_seq_lengths": jnp.array([3, 4])}),
    "shapes": ((X, X, X), {"query_seq_lengths": jax.ShapeDtypeStruct((2,), jnp.int32)}),
    "bias and mask": (
        (X, X, X, jax.ShapeDtypeStruct((300, 300), jnp.float32), jnp.ones((1, 300), bool)),
        {"is_causal": True, "local_window_size": 4, "scale": 2},
    ),
}


@pytest.mark.parametrize(("arrays", "options"), ARGUMENTS.values(), ids=list(ARGUMENTS))
def test_arguments_may_be_arrays_or_shapes(arrays: tuple[Any, ...], options: dict[str, Any]):
    assert sigjax.explain(*arrays, **options).kernels


def test_explain_raises_what_the_op_raises():
    with pytest.raises(ValueError, match="query_seq_lengths must have shape"):
        sigjax.explain(X, X, X, query_seq_lengths=jnp.ones(3, int))
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        sigjax.explain(X, X, X, causal=True)
    with compile_for(75), pytest.raises(NotImplementedError, match="has 7\\.5"):
        sigjax.explain(X, X, X, implementation="triton")
