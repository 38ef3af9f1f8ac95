"""Lengths in the Hopper kernels: what lies past them takes no part, without a mask.

The kernels' source runs in NumPy, see emulated_hopper; on a GPU they run themselves.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigjax.kernels import hopper_backward_launch, hopper_launch
from sigjax.kernels.hopper_backward import hopper_backward_kernel
from sigjax.kernels.hopper_forward import hopper_forward_kernel
from sigjax.operands import Operands, Settings
from tests import definition, emulated_hopper, ptxas

# Of queries and keys: all, none, one, a prime, one past a tile of 64 and of 128, a whole tile.
LENGTHS = ([200, 0, 1, 97, 129, 128], [260, 130, 0, 101, 65, 128])
CALLS: dict[str, dict[str, Any]] = {"all": {}, "causal": {"is_causal": True}}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
head_sizes = pytest.mark.parametrize("head_size", [64, 128], ids=["H64", "H128"])
poisons = pytest.mark.parametrize("poison", [np.nan, np.inf], ids=["nan", "inf"])


def operands_of(head_size: int, poison: float, dtype: str) -> tuple[Operands, jax.Array]:
    """Random operands and an output gradient, poison past the lengths."""
    rng = np.random.default_rng(0)
    arrays = [
        rng.standard_normal((len(LENGTHS[0]), length, 2, head_size)) for length in (200, 260, 260)
    ]
    arrays.append(rng.standard_normal(arrays[0].shape))
    for array, lengths in zip(arrays, (0, 1, 1, 0), strict=True):
        for row, length in enumerate(LENGTHS[lengths]):
            array[row, length:] = poison
    query, key, value, gradient = (jnp.asarray(x, dtype) for x in arrays)
    counts = [jnp.array(x, jnp.int32) for x in LENGTHS]
    operands = Operands(query, key, value, query_lengths=counts[0], key_lengths=counts[1])
    return operands, gradient


@pytest.mark.parametrize(
    ("call", "poison"), [({}, np.nan), ({"is_causal": True}, np.inf)], ids=["nan", "causal-inf"]
)
@head_sizes
def test_nothing_past_a_length_reaches_outputs_or_gradients(
    head_size: int, call: dict[str, Any], poison: float
):
    operands, gradient = operands_of(head_size, poison, "float32")
    clean, clean_gradient = operands_of(head_size, 0.0, "float32")
    settings = Settings(scale=0.1, **call)
    want = definition.attention(clean, settings)
    np.testing.assert_allclose(
        emulated_hopper.forward(operands, settings), want, rtol=1e-5, atol=5e-5
    )
    got, _ = emulated_hopper.backward(operands, settings, gradient)
    for name, expected in definition.gradients(clean, settings, clean_gradient).items():
        found = np.asarray(getattr(got, name))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4, err_msg=name)
        for row, length in enumerate(LENGTHS[name != "query"]):
            assert not found[row, length:].any(), name


def with_infinity(operands: Operands) -> Operands:
    """The same, one element of query 20 of the fourth sequence's first head infinite."""
    return operands._replace(query=operands.query.at[3, 20, 0, 5].set(jnp.inf))


def assert_only_its_row_differs(got: np.ndarray, want: np.ndarray) -> None:
    """But for the row of with_infinity, of a number for every pair of bits."""
    others = np.ones(got.shape[:3], bool)
    others[3, 20, 0] = False
    np.testing.assert_array_equal(got[others], want[others])


@head_sizes
def test_an_infinite_query_reaches_no_other(head_size: int):
    """It may be NaN itself: it meets zeros where its keys end."""
    operands, _ = operands_of(head_size, np.nan, "float32")
    got, want = (
        np.asarray(emulated_hopper.forward(x, Settings(scale=0.1)))
        for x in (with_infinity(operands), operands)
    )
    assert_only_its_row_differs(got, want)


@pytest.mark.gpu
@head_sizes
def test_so_it_is_on_a_gpu(head_size: int):
    operands, _ = operands_of(head_size, np.nan, "bfloat16")
    run = jax.jit(lambda x: hopper_launch.forward(x, Settings(scale=0.1)))
    got, want = (np.asarray(run(x).view(jnp.uint16)) for x in (with_infinity(operands), operands))
    assert_only_its_row_differs(got, want)


@pytest.mark.gpu
@poisons
@calls
@head_sizes
def test_lengths_change_no_bit_whatever_lies_past_them(
    head_size: int, call: dict[str, Any], poison: float
):
    settings = Settings(scale=head_size**-0.5, **call)

    @jax.jit
    def run(operands: Operands, gradient: jax.Array) -> list[jax.Array]:
        gradients = hopper_backward_launch.backward(operands, settings, gradient)
        # The order in which parts of a query's gradient are added is not fixed.
        return [hopper_launch.forward(operands, settings), gradients.key, gradients.value]

    dirty, clean = (run(*operands_of(head_size, x, "bfloat16")) for x in (poison, 0.0))
    for got, want in zip(dirty, clean, strict=True):
        np.testing.assert_array_equal(got.view(jnp.uint16), want.view(jnp.uint16))
        assert np.isfinite(np.asarray(got, np.float32)).all()


@head_sizes
def test_lengths_cost_the_forward_kernel_no_spill(head_size: int):
    def run(x: jax.Array, lengths: jax.Array) -> jax.Array:
        return hopper_launch.forward(same(x, lengths), Settings(scale=1.0))

    ptxas.assert_no_spill(ptxas.ptx_of(hopper_forward_kernel, run, *shapes(head_size)))


@head_sizes
def test_lengths_cost_the_backward_kernel_no_spill(head_size: int):
    def run(x: jax.Array, lengths: jax.Array) -> tuple[jax.Array, ...]:
        return hopper_backward_launch.backward(same(x, lengths), Settings(scale=1.0), x)[:3]

    ptxas.assert_no_spill(ptxas.ptx_of(hopper_backward_kernel, run, *shapes(head_size)))


def same(x: jax.Array, lengths: jax.Array) -> Operands:
    """Operands that are all one array."""
    return Operands(x, x, x, query_lengths=lengths, key_lengths=lengths)


def shapes(head_size: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of the operands, and of lengths."""
    x = jax.ShapeDtypeStruct((4, 1024, 2, head_size), jnp.bfloat16)
    return x, jax.ShapeDtypeStruct((4,), jnp.int32)
