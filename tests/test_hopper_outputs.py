"""How the Hopper forward kernel stores outputs: hopper_outputs.py."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigjax.choice import compile_for
from sigjax.kernels import hopper_launch
from sigjax.kernels.tiles import Output, hopper_forward_tile
from sigjax.operands import Operands, Settings
from tests import definition, emulated_hopper
from tests.in_turn import HEAD_SIZES, in_turn

LENGTHS = ([300, 0, 65, 192], [260, 130, 0, 64])
CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dense": (None, {}),
    "causal": (None, {"is_causal": True}),
    "ragged": (LENGTHS, {}),
    "ragged-window": (LENGTHS, {"window": (70, 9)}),
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
head_sizes = pytest.mark.parametrize("head_size", [64, 128], ids=["H64", "H128"])
outputs = pytest.mark.parametrize("output", ["rows", "tma", "registers"])


def operands_of(head_size: int, lengths: Any, dtype: str = "float32") -> Operands:
    """Random operands; no row of tiles is whole."""
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.standard_normal((4, length, 2, head_size)), dtype)
        for length in (301, 260, 260)
    )
    if lengths is None:
        return Operands(query, key, value)
    counts = [jnp.array(x, jnp.int32) for x in lengths]
    return Operands(query, key, value, query_lengths=counts[0], key_lengths=counts[1])


@outputs
@in_turn("call", CALLS, head_size=HEAD_SIZES)
def test_every_row_of_the_output_is_stored_once_it_is_computed(
    head_size: int, call: tuple[Any, dict[str, Any]], output: Output
):
    operands, settings = operands_of(head_size, call[0]), Settings(scale=0.1, **call[1])
    tile = replace(hopper_forward_tile(head_size), output=output)
    want = definition.attention(operands, settings)
    got = emulated_hopper.forward(operands, settings, tile)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=5e-5)
    if call[0] is not None:
        for row, length in enumerate(LENGTHS[0]):
            assert not np.any(got[row, length:])


@pytest.mark.gpu
@calls
@head_sizes
def test_the_way_of_an_output_changes_no_bit(head_size: int, call: tuple[Any, dict[str, Any]]):
    operands = operands_of(head_size, call[0], "bfloat16")
    settings = Settings(scale=0.1, **call[1])

    def stored(output: Output) -> np.ndarray:
        tile = replace(hopper_forward_tile(head_size), output=output)
        result = jax.jit(lambda x: hopper_launch.forward(x, settings, tile))(operands)
        return np.asarray(result.view(jnp.uint16))

    by_rows = stored("rows")
    np.testing.assert_array_equal(stored("tma"), by_rows)
    np.testing.assert_array_equal(stored("registers"), by_rows)


@pytest.mark.usefixtures("kernels_without_code")
def test_no_buffer_is_filled_before_an_output_stored_by_tma():
    x = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16)
    with compile_for(90):
        lowered = (
            jax.jit(lambda q: hopper_launch.forward(Operands(q, q, q), Settings(scale=1.0)))
            .trace(x)
            .lower(lowering_platforms=("cuda",))
        )
    text = lowered.as_text()
    assert "AllocateBuffer" in text
    assert "broadcast_in_dim" not in text
