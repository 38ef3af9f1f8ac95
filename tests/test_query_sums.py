"""Sums of query gradients are cleared and become gradients, and what is past a length is not read.

The kernel's source runs in NumPy, see emulated_hopper.
"""

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigjax.choice import compile_for
from sigjax.kernels import launch, query_sums_launch
from sigjax.kernels.query_sums import COLUMNS, ROWS
from sigjax.kernels.tiles import hopper_backward_tile
from sigjax.operands import Operands, Settings
from tests import emulated_hopper

SETTINGS = Settings(scale=0.3)
# Batch, rows, query heads, key heads, head size, lengths.
CASES: dict[str, tuple[int, int, int, int, int, list[int] | None]] = {
    "one-row": (1, 1, 1, 1, 64, None),
    "a-tile": (2, ROWS.value, 2, 2, 64, None),
    "one-past-a-tile": (1, ROWS.value + 1, COLUMNS.value // 64 + 1, 1, 64, None),
    "prime": (2, 67, 3, 3, 128, None),
    "lengths": (4, 67, 2, 1, 128, [67, 0, 1, 33]),
    "lengths-of-tiles": (3, 96, 4, 2, 64, [32, 64, 96]),
}


def operands_of(case: tuple[int, int, int, int, int, Any], dtype: str) -> Operands:
    batch, length, heads, kv_heads, head_size, _ = case
    query = jnp.zeros((batch, length, heads, head_size), dtype)
    key = jnp.zeros((batch, 5, kv_heads, head_size), dtype)
    return Operands(query, key, key)


def lengths_of(case: tuple[int, int, int, int, int, Any]) -> jax.Array | None:
    return None if case[5] is None else jnp.array(case[5], jnp.int32)


def outside(case: tuple[int, int, int, int, int, Any]) -> np.ndarray:
    """[B, T]: whether a row is past its length."""
    rows = np.arange(case[1])[None]
    return rows >= np.array(case[5] or [case[1]] * case[0])[:, None]


def sums_of(case: tuple[int, int, int, int, int, Any]) -> np.ndarray:
    """[B, T, N * H], NaN past the lengths."""
    batch, length, heads, _, head_size, _ = case
    sums = np.random.default_rng(0).standard_normal((batch, length, heads * head_size))
    return np.where(outside(case)[..., None], np.nan, sums).astype("f4")


def gradient_of(case: Any, dtype: str, range_scale: np.ndarray | None) -> np.ndarray:
    """What is to come, float32."""
    _, _, heads, kv_heads, head_size, _ = case
    scale = np.float32(SETTINGS.scale)
    sums = sums_of(case).reshape(*sums_of(case).shape[:2], heads, head_size)
    factor = scale
    if range_scale is not None:
        factor = np.repeat(scale / range_scale, heads // kv_heads, 1)[:, None, :, None]
    gradient = np.where(outside(case)[..., None, None], 0, sums * factor)
    return np.asarray(jnp.asarray(gradient, dtype).astype("float32"))


def range_scale_of(case: Any, dtype: str) -> np.ndarray | None:
    """Powers of two [B, K], in float16 alone."""
    if dtype != "float16":
        return None
    return 2.0 ** np.random.default_rng(1).integers(-3, 4, (case[0], case[3])).astype("f4")


def finished(case: Any, dtype: str, range_scale: np.ndarray | None) -> jax.Array:
    return query_sums_launch.query_gradient(
        jnp.asarray(sums_of(case)),
        operands_of(case, dtype),
        SETTINGS,
        lengths_of(case),
        None if range_scale is None else jnp.asarray(range_scale),
    )


@pytest.fixture
def emulated():
    with mock.patch.object(launch, "call", emulated_hopper.Emulator().call), compile_for(90):
        yield


cases = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
dtypes = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


@cases
@pytest.mark.usefixtures("emulated")
def test_sums_begin_as_zeros_up_to_the_lengths(case: Any):
    tile = hopper_backward_tile(case[4])
    sums = np.asarray(
        query_sums_launch.cleared(operands_of(case, "bfloat16"), lengths_of(case), tile).base
    )
    # The emulator's memory is NaN until something is stored.
    want = np.broadcast_to(np.where(outside(case)[..., None], np.nan, 0), sums.shape)
    np.testing.assert_array_equal(sums, want)


@cases
@dtypes
@pytest.mark.usefixtures("emulated")
def test_they_become_gradients_and_what_is_past_the_lengths_zeros(case: Any, dtype: str):
    range_scale = range_scale_of(case, dtype)
    got = finished(case, dtype, range_scale)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.astype("float32"), gradient_of(case, dtype, range_scale))


@pytest.mark.parametrize("head_size", [64, 128], ids=["H64", "H128"])
@pytest.mark.parametrize("with_lengths", [False, True], ids=["full", "lengths"])
def test_a_backward_pass_launches_it_before_and_after_its_kernel(
    head_size: int, with_lengths: bool, monkeypatch: pytest.MonkeyPatch
):
    names = []
    call = launch.call

    def spy(kernel: Any, *arguments: Any, **options: Any) -> Any:
        names.append(kernel.__name__)
        return call(kernel, *arguments, **options)

    monkeypatch.setattr(launch, "call", spy)
    x = jax.ShapeDtypeStruct((2, 300, 2, head_size), "bfloat16")
    lengths = jax.ShapeDtypeStruct((2,), "int32") if with_lengths else None

    def backward(x: jax.Array, lengths: jax.Array | None) -> Any:
        operands = Operands(x, x, x, query_lengths=lengths, key_lengths=lengths)
        return launch.backward(operands, SETTINGS, x)

    with compile_for(90):
        jax.jit(backward).trace(x, lengths).lower(lowering_platforms=("cuda",))
    assert names == ["query_sums_kernel", "hopper_backward_kernel", "query_sums_kernel"]


@pytest.mark.gpu
@cases
@dtypes
def test_so_it_is_on_a_gpu(case: Any, dtype: str):
    range_scale = range_scale_of(case, dtype)
    got = jax.jit(lambda: finished(case, dtype, range_scale))()
    np.testing.assert_array_equal(got.astype("float32"), gradient_of(case, dtype, range_scale))
    tile = hopper_backward_tile(case[4])
    operands, lengths = operands_of(case, dtype), lengths_of(case)
    sums = jax.jit(lambda: query_sums_launch.cleared(operands, lengths, tile).base)()
    assert not np.asarray(sums)[~outside(case)].any()
