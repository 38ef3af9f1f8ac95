"""The Hopper forward kernel's adaptive weights: how near the polynomial is, and the kernel."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.first_launch import violations
from sigjax.kernels import hopper_launch, hopper_weights
from sigjax.kernels.hopper_forward import hopper_forward_kernel
from sigjax.kernels.tiles import hopper_forward_tile
from sigjax.numerics import Case
from sigjax.operands import Operands, Settings
from tests import ptxas

LENGTHS = ((200, 2048), (77, 1700), (5, 1000), (200, 0))


def bracket(weight: np.ndarray) -> np.ndarray:
    """E - E^2 + E^3 of a weight, in float64."""
    stretched = 2**hopper_weights.LOG2_STRETCH.value * weight / (1 - weight)
    return stretched - stretched**2 + stretched**3


def test_the_polynomial_is_near_every_weight_that_is_called_small():
    bits = int(hopper_weights._SMALL_WEIGHTS, 16)
    assert bits >> 16 == bits & 0xFFFF
    largest = float(np.array([bits & 0xFFFF], np.uint16).view(jnp.bfloat16)[0])
    weight = np.geomspace(1e-30, 0.12, 200_001)
    # What rounds to the largest or below, ties to even included.
    small = weight[bracket(weight) <= largest * (1 + 2.0**-8)]
    assert small.max() > 0.107
    error = hopper_weights.SHRINK.value * bracket(small) / small - 1
    assert np.abs(error).max() < 4.1e-4


def test_the_first_block_calls_no_weight_small_that_the_polynomial_does_not():
    limit = 2**hopper_weights.LOG2_SMALL.value
    largest = np.array([0x3DDF], np.uint16).view(jnp.bfloat16)[0]
    assert bracket(np.array(limit / (1 + limit))).astype(jnp.bfloat16) <= largest


@pytest.mark.parametrize("head_size", [64, 128], ids=["H64", "H128"])
def test_triton_leaves_the_barriers_free_that_the_choice_of_a_tile_waits_at(head_size: int):
    x = jax.ShapeDtypeStruct((2, 2048, 2, head_size), "bfloat16")

    def forward(x: jax.Array) -> jax.Array:
        return hopper_launch.forward(Operands(x, x, x), Settings(scale=0.3))

    text = ptxas.ptx_of(hopper_forward_kernel, forward, x)
    consumers = hopper_forward_tile(head_size).consumers
    ours = re.findall(r"barrier\.cta\.red\.or\.pred \w+, (\d+)", text)
    assert sorted(map(int, ours)) == list(range(8, 8 + consumers))
    theirs = re.findall(r"\bbar(?:rier)?\.sync\s+(\d+)", text)
    assert theirs
    assert max(map(int, theirs)) < 8


@pytest.mark.gpu
@pytest.mark.parametrize("factor", [1.0, 1.3, 3.0, 8.0, -1.0], ids=lambda x: f"x{x:g}")
@pytest.mark.parametrize(
    "case",
    [
        Case("bfloat16", 64, 200, 2048),
        Case("bfloat16", 64, 200, 2048, 2, lengths=LENGTHS),
        Case("bfloat16", 64, 1700, 1700, is_causal=True),
        Case("bfloat16", 64, 200, 2048, biases=True, lengths=LENGTHS),
    ],
    ids=["full", "lengths-grouped", "causal", "biases"],
)
@pytest.mark.parametrize("head_size", [64, 128], ids=["H64", "H128"])
def test_many_keys_keep_the_tolerance_rule(head_size: int, case: Case, factor: float):
    case = replace(case, head_size=head_size, scale=factor * head_size**-0.5)
    assert violations(case, "triton") == []


@pytest.mark.gpu
@pytest.mark.parametrize("factor", [1.0, 2.0, 8.0], ids=lambda x: f"x{x:g}")
@pytest.mark.parametrize(("keys", "bucket"), [(1000, 2048), (1700, 4096)])
@pytest.mark.parametrize("head_size", [64, 128], ids=["H64", "H128"])
def test_a_row_has_the_same_bits_in_any_bucket(
    head_size: int, keys: int, bucket: int, factor: float
):
    """At 64 no code for adaptive weights is compiled for the bucket of fewer keys, tiles.few."""
    assert hopper_forward_tile(head_size).few == (1536 if head_size == 64 else 0)
    seeds = jax.random.split(jax.random.key(0), 3)
    query, key, value = (
        jax.random.normal(seed, (1, rows, 2, head_size), "bfloat16")
        for seed, rows in zip(seeds, (200, bucket, bucket), strict=True)
    )
    settings = Settings(scale=factor * head_size**-0.5)

    def output(padded: int) -> jax.Array:
        lengths = {"query_lengths": jnp.array([200]), "key_lengths": jnp.array([keys])}
        operands = Operands(query, key[:, :padded], value[:, :padded], **lengths)
        return hopper_launch.forward(operands, settings)

    np.testing.assert_array_equal(output(keys), output(bucket))
