"""Padding between packed segments in the Hopper forward kernel: its values arrive as zeros.

The kernel's source runs in NumPy, see emulated_hopper; on a GPU test_hopper_pairs runs it.
"""

import re
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sigjax import reference
from sigjax.choice import compile_for
from sigjax.kernels import hopper_launch
from sigjax.kernels.hopper_forward import hopper_forward_kernel
from sigjax.kernels.tiles import hopper_forward_tile
from sigjax.operands import Operands, Settings
from tests import definition, emulated_hopper, ptxas
from tests.in_turn import HEAD_SIZES, in_turn

LENGTH, BLOCK = 330, 128
PLAIN = Settings(scale=0.1)
head_sizes = pytest.mark.parametrize("head_size", HEAD_SIZES, ids=["H64", "H128"])
type Parts = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Packed:
    """A call with packed rows.

    Attributes:
        rows: (segment id, how many) of each row, 0 and below is padding, as is what is left.
        key_rows: those of the keys; None is rows.
        lengths: of the queries, and of the keys, of each row; None is all.
        settings: window and causality.
        bias: whether there is a bias for each pair.
    """

    rows: tuple[Parts, ...]
    key_rows: tuple[Parts, ...] | None = None
    lengths: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    settings: Settings = PLAIN
    bias: bool = False

    def operands(self, head_size: int) -> Operands:
        """Random operands in float32."""
        rng = np.random.default_rng(0)
        ids = [jnp.asarray([*map(ids_of, x)]) for x in (self.rows, self.key_rows or self.rows)]
        shape = (len(self.rows), LENGTH, 1, head_size)
        arrays = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(3)]
        operands = Operands(*arrays, query_segments=ids[0], key_segments=ids[1])
        if self.lengths is not None:
            lengths = [jnp.asarray(x, jnp.int32) for x in self.lengths]
            operands = operands._replace(query_lengths=lengths[0], key_lengths=lengths[1])
        if self.bias:
            bias = rng.standard_normal((1, 1, LENGTH, LENGTH))
            operands = operands._replace(bias=jnp.asarray(bias, jnp.float16))
        return operands


def ids_of(parts: Parts) -> np.ndarray:
    """The segment ids of a row, [LENGTH]."""
    ids = np.concatenate([np.full(count, part, np.int32) for part, count in parts])
    return np.pad(ids, (0, LENGTH - len(ids)))


START = ((0, 9), (1, 191), (2, 130))
MIDDLE = ((1, 140), (-1, 3), (2, 40), (0, 1), (3, 146))
WHOLE = ((1, 128), (2, 128), (3, 74))
CALLS = {
    "at-the-start": Packed((START,)),
    "in-the-middle": Packed((MIDDLE,)),
    "of-one-key": Packed((((1, 127), (0, 1), (2, 128), (-(2**31), 1), (3, 73)),)),
    "of-a-whole-block": Packed((((1, 128), (0, 128), (1, 74)),)),
    "where-the-last-segment-ends-inside-a-block": Packed((((1, 100), (2, 70)),)),
    "everywhere": Packed((((0, 1),), MIDDLE)),
    "elsewhere-in-each-row": Packed((START, MIDDLE, WHOLE)),
    "in-any-order": Packed((((3, 60), (0, 5), (1, 130), (3, 30), (0, 70), (1, 35)),)),
    "of-keys-alone": Packed((WHOLE,), key_rows=(MIDDLE,)),
    "lengths": Packed((START, MIDDLE, WHOLE), lengths=((330, 129, 7), (280, 145, 129))),
    "window": Packed((MIDDLE, START), settings=Settings(scale=0.1, window=(40, 25))),
    "causal": Packed((START, MIDDLE), settings=Settings(scale=0.1, is_causal=True)),
    "window-lengths": Packed(
        (MIDDLE, START), None, ((250, 330), (201, 322)), Settings(scale=0.1, window=(130, 0))
    ),
    "bias": Packed((MIDDLE,), lengths=((320,), (320,)), bias=True),
}


def poisoned(operands: Operands, poison: float) -> Operands:
    """The same with poison in all that takes no part."""
    rows = reference.valid_queries(operands)[:, :, None, None]
    columns = reference.valid_keys(operands)[:, :, None, None]
    return operands._replace(
        query=jnp.where(rows, operands.query, poison),
        key=jnp.where(columns, operands.key, poison),
        value=jnp.where(columns, operands.value, poison),
    )


@in_turn(
    "call", CALLS, head_size=HEAD_SIZES, poison=(np.nan, np.inf, -np.inf), slow=(None, 0, 1, 0, 2)
)
def test_padding_reaches_no_output(call: Packed, head_size: int, poison: float, slow: int | None):
    operands = call.operands(head_size)
    got, dirty = (
        emulated_hopper.forward(x, call.settings, slow=slow)
        for x in (operands, poisoned(operands, poison))
    )
    want = definition.attention(operands, call.settings)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=5e-5)
    np.testing.assert_array_equal(dirty, got)
    assert not jnp.where(reference.valid_queries(operands)[:, :, None, None], 0, got).any()


@pytest.mark.parametrize("poison", [np.nan, np.inf], ids=["nan", "inf"])
@head_sizes
def test_so_it_is_with_adaptive_weights(head_size: int, poison: float):
    operands = CALLS["bias"].operands(head_size)
    narrow = [getattr(operands, name).astype(jnp.bfloat16) for name in Operands._fields[:3]]
    operands = operands._replace(query=narrow[0], key=narrow[1], value=narrow[2])
    tile = replace(
        hopper_forward_tile(head_size, pairs="bias"), weights="adaptive", early=head_size == 128
    )
    # All weights are small.
    settings = Settings(scale=0.01, result_dtype=np.dtype("float32"))
    operands = operands._replace(sigmoid_bias=jnp.full((1, 1), -6.0))
    got, dirty = (
        emulated_hopper.forward(x, settings, tile) for x in (operands, poisoned(operands, poison))
    )
    assert jnp.isfinite(got).all()
    np.testing.assert_array_equal(dirty, got)


MENDED = {
    "none": (Packed((WHOLE,)), 0),
    # What is past the length arrives as zeros.
    "past-the-length": (Packed((((1, 70), (2, 60)),), lengths=((LENGTH,), (130,))), 0),
    "in-one": (Packed((((1, 127), (0, 1), (2, 202)),)), 1),
    # The second block is read by two tiles of queries.
    "in-two": (Packed((((1, 127), (0, 2), (2, 201)),)), 3),
}


@pytest.mark.parametrize("call", MENDED.values(), ids=list(MENDED))
@head_sizes
def test_only_blocks_with_padding_are_mended(head_size: int, call: tuple[Packed, int]):
    packed, blocks = call
    mended: list[int] = []
    cut = emulated_hopper.Buffer.slice

    def count(
        buffer: emulated_hopper.Buffer, start: int, length: int, dim: int = 0
    ) -> emulated_hopper.Buffer:
        mended.append(length)
        return cut(buffer, start, length, dim)

    with mock.patch.object(emulated_hopper.Buffer, "slice", count):
        emulated_hopper.forward(packed.operands(head_size), packed.settings)
    assert sum(mended) == blocks * BLOCK


def shapes(head_size: int) -> Any:
    """Packed operands of a call as the kernel is timed."""
    x: Any = jax.ShapeDtypeStruct((4, 4096, 2048 // head_size, head_size), jnp.bfloat16)
    ids: Any = jax.ShapeDtypeStruct(x.shape[:2], jnp.int32)
    return Operands(x, x, x, query_segments=ids, key_segments=ids)


@head_sizes
def test_a_packed_forward_pass_is_two_kernels_and_nothing_else(head_size: int):
    def run(operands: Operands) -> jax.Array:
        return hopper_launch.forward(operands, PLAIN)

    with compile_for(90):
        lowered = jax.jit(run).trace(shapes(head_size)).lower(lowering_platforms=("cuda",))
    operations = re.findall(r"= stablehlo\.(\w+) ?(@\w+)?", lowered.as_text())
    kernel, buffer = ("custom_call", "@triton_kernel_call_ffi"), ("custom_call", "@AllocateBuffer")
    # At 64 TMA stores the output, which has to be there before.
    assert operations == ([kernel, buffer, kernel] if head_size == 64 else [kernel, kernel])


@head_sizes
def test_packed_rows_cost_no_spill(head_size: int):
    def run(operands: Operands) -> jax.Array:
        return hopper_launch.forward(operands, PLAIN)

    ptxas.assert_no_spill(ptxas.ptx_of(hopper_forward_kernel, run, shapes(head_size)))
