"""The Hopper forward kernel's adaptive weights: how near the polynomial is, and the kernel."""

import re
from dataclasses import replace
from typing import Any

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
from tests import emulated_hopper, emulated_ptx, ptxas

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


FACTOR, OFFSET = np.float32(-0.18), np.float32(12 - hopper_weights.LOG2_STRETCH.value)


def weights_of_a_warp(kind: str, logit: np.ndarray, registers: dict[str, np.ndarray]) -> np.ndarray:
    """What the PTX gives for [64, 32] logits, 64 of each lane."""
    t = np.float32(-np.log2(np.e)) * logit - np.float32(hopper_weights.LOG2_STRETCH.value)
    inputs = [*(t if kind == "t" else ((t - OFFSET) / FACTOR).astype("f4"))]
    words = emulated_ptx.run(hopper_weights._adaptive_ptx(0, kind), inputs, 32, registers)
    halves = np.stack([words & 0xFFFF, words >> 16], 1).reshape(64, 32).astype(np.uint16)
    return halves.view(jnp.bfloat16).astype("f4") * hopper_weights.SHRINK.value


def fresh_registers(pausing: int = 0) -> dict[str, np.ndarray]:
    numbers = {"pausing0": pausing, "pause0": 4}
    return {name: np.full(32, x, np.uint32) for name, x in numbers.items()} | {
        name: np.full(32, x).view(np.uint32)
        for name, x in (("factor0", FACTOR), ("offset0", OFFSET))
    }


@pytest.mark.parametrize("pausing", [0, 2])
@pytest.mark.parametrize("largest", [-3.0, 0.0, 30.0])
@pytest.mark.parametrize("kind", ["scores", "t"])
def test_the_ptx_computes_weights(kind: str, largest: float, pausing: int):
    rng = np.random.default_rng(0)
    logit = rng.uniform(-20, -4, (64, 32)).astype("f4")
    logit[5, 7] = largest
    want = 1 / (1 + np.exp(-logit.astype("f8")))
    registers = fresh_registers(pausing)
    got = weights_of_a_warp(kind, logit, registers)
    np.testing.assert_allclose(got, want, rtol=2.0**-8 + 5e-4, atol=2.0**-61)
    tried = largest < -2 or bool(pausing)
    assert registers["pausing0"][0] == (max(pausing - 1, 0) if tried else 4)
    assert registers["pause0"][0] == (4 if tried else 16)


@pytest.mark.parametrize("kind", ["scores", "t"])
def test_a_nan_that_takes_part_stays_one(kind: str):
    logit = np.full((64, 32), -5, "f4")
    logit[20, 4] = np.nan
    got = weights_of_a_warp(kind, logit, fresh_registers())
    assert np.isnan(got[20, 4])
    assert not np.isnan(got[:, :4]).any()


def scores_of(head_size: int, seed: int) -> np.ndarray:
    """[64, 128] scores of normal queries and keys, of variance 1."""
    rng = np.random.default_rng(seed)
    rows, columns = (rng.standard_normal((n, head_size)) for n in (64, 128))
    return (rows @ columns.T / head_size**0.5).astype("f4")


def exceeds(scores: np.ndarray, limit: float, deviations: float) -> bool:
    return emulated_hopper._exceeds(scores, np.float32(limit), deviations, 0)


@pytest.mark.parametrize(
    ("head_size", "deviations"), [(64, 4.7), (128, 4.7), (128, 4.5)], ids=lambda x: f"{x}"
)
@pytest.mark.parametrize(("size", "mean"), [(1.0, 0.0), (0.3, 2.0), (3.0, -2.0)])
def test_a_block_says_whether_others_have_large_logits(
    head_size: int, deviations: float, size: float, mean: float
):
    """By how many deviations a large one is from the mean, within a tenth of them."""
    tile = hopper_forward_tile(head_size)
    assert deviations in (tile.deviations, tile.deviations_of_many)
    for seed in range(40):
        # Without an element that says so alone.
        scores = size * np.minimum(scores_of(head_size, seed), 3.9) + np.float32(mean)
        assert not exceeds(scores, mean + size * (deviations + 0.5), deviations)
        assert exceeds(scores, mean + size * (deviations - 0.5), deviations)


def test_one_large_logit_says_so_of_every_other_8_keys():
    for key in range(128):
        scores = scores_of(64, 0)
        scores[key % 64, key] = 6.1
        assert exceeds(scores, 6, 4.7) == (key % 16 < 8)


def test_excluded_pairs_and_nans_say_nothing():
    scores = scores_of(64, 0)
    scores[:, 50:60] = -np.inf
    scores[40] = np.nan
    assert not exceeds(scores, 6, 4.7)
    assert exceeds(scores, 4, 4.7)
    assert not exceeds(np.full((64, 128), -np.inf, "f4"), 6, 4.7)


@pytest.mark.parametrize(("keys", "is_exact"), [(2944, True), (3072, False)], ids=lambda x: f"{x}")
def test_many_keys_take_a_larger_share_of_large_logits(keys: int, is_exact: bool):
    """Large logits are 4.6 deviations away."""
    rng = np.random.default_rng(0)
    operands = Operands(
        *(
            jnp.asarray(rng.standard_normal((1, rows, 1, 128)), jnp.bfloat16)
            for rows in (64, keys, keys)
        ),
        sigmoid_bias=jnp.float32(np.log(0.12) - 4.6),
    )
    settings, tile = Settings(scale=128**-0.5), hopper_forward_tile(128).for_keys(keys)
    assert tile.weights == "adaptive"
    got, exact = (emulated_hopper.forward(operands, settings, x, 1) for x in (tile, tile.exact()))
    assert np.array_equal(got, exact) == is_exact


@pytest.mark.parametrize("limit", [1.0, 3.0, 4.4, 5.0])
def test_the_ptx_says_what_the_emulated_kernel_does(limit: float):
    rng = np.random.default_rng(1)
    ptx = hopper_weights._exceeds_ptx(0)
    greatest, least = hopper_weights.GREATEST.value, hopper_weights.LEAST.value
    above = 1 + (4.5 - greatest) / (greatest + least)
    for seed in range(8):
        scores = scores_of(64, seed) * np.float32(rng.uniform(0.8, 1.2))
        scores[:, : seed * 16] = -np.inf
        inputs = emulated_hopper.elements_of_threads(scores)
        numbers = {"limit0": limit, "above0": above, "below0": 1 - above}
        registers = {name: np.full(128, x, "f4").view(np.uint32) for name, x in numbers.items()}
        emulated_ptx.run(ptx, [*inputs], 16, registers)
        assert registers["found0"].tolist() == [exceeds(scores, limit, 4.5)] * 128


@pytest.mark.parametrize("head_size", [64, 128], ids=["H64", "H128"])
def test_triton_leaves_the_barriers_free_that_the_choice_of_a_tile_waits_at(head_size: int):
    x = jax.ShapeDtypeStruct((2, 2048, 2, head_size), "bfloat16")

    def forward(x: jax.Array) -> jax.Array:
        return hopper_launch.forward(Operands(x, x, x), Settings(scale=0.3))

    text = ptxas.ptx_of(hopper_forward_kernel, forward, x)
    consumers = hopper_forward_tile(head_size).consumers
    for ours in (r"or\.pred", r"popc\.u32"):
        found = re.findall(rf"barrier\.cta\.red\.{ours} \w+, (\d+)", text)
        assert sorted(map(int, found)) == list(range(8, 8 + consumers))
    theirs = re.findall(r"\bbar(?:rier)?\.sync\s+(\d+)", text)
    assert theirs
    assert max(map(int, theirs)) < 8


@pytest.mark.parametrize(
    ("head_size", "length", "options"),
    [
        (64, 300, {}),
        (64, 300, {"is_causal": True}),
        (128, 2048, {}),
        (128, 2048, {"fast_sigmoid": True}),
    ],
    ids=["short", "short-causal", "turns", "tanh"],
)
def test_no_register_is_kept_in_memory(head_size: int, length: int, options: dict[str, Any]):
    x = jax.ShapeDtypeStruct((2, length, 2, head_size), "bfloat16")

    def forward(x: jax.Array) -> jax.Array:
        return hopper_launch.forward(Operands(x, x, x), Settings(scale=0.3, **options))

    ptxas.assert_no_spill(ptxas.ptx_of(hopper_forward_kernel, forward, x))


@pytest.mark.gpu
@pytest.mark.parametrize("factor", [1.0, 1.5, 2.0, 8.0], ids=lambda x: f"x{x:g}")
@pytest.mark.parametrize("call", ["dense", "causal", "ragged", "one-block"])
def test_turns_change_no_bit(call: str, factor: float):
    """Tiles of which no, some or all rows' weights are exact, and such with idle consumers."""
    rows, keys = (2100, 120) if call == "one-block" else (2100, 2100)
    seeds = jax.random.split(jax.random.key(0), 4)
    shapes = [(3, rows, 8, 128), (3, keys, 8, 128), (3, keys, 8, 128)]
    arrays = [
        jax.random.normal(seed, shape, "bfloat16")
        for seed, shape in zip(seeds, shapes, strict=False)
    ]
    # A row in 200 is larger: whether a consumer's rows have one is a matter of chance.
    larger = jax.random.bernoulli(seeds[3], 0.005, (3, rows, 8, 1))
    arrays[0] = jnp.where(larger, arrays[0] * factor, arrays[0])
    operands = Operands(*arrays)
    if call == "ragged":
        lengths = {"query_lengths": jnp.array([2100, 77, 1000])}
        operands = operands._replace(**lengths, key_lengths=jnp.array([130, 0, 2000]))
    settings = Settings(scale=128**-0.5, is_causal=call == "causal")
    tile = hopper_forward_tile(128)
    assert tile.turns == "exact"
    want = hopper_launch.forward(operands, settings, replace(tile, turns="never"))
    for _ in range(20):
        got = hopper_launch.forward(operands, settings, tile)
        np.testing.assert_array_equal(got, want)


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
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("keys", "bucket"),
    [(300, 512), (300, 4096), (700, 1024), (700, 4096), (1000, 2048), (1700, 4096)],
)
@pytest.mark.parametrize("head_size", [64, 128], ids=["H64", "H128"])
def test_a_row_has_the_same_bits_in_any_bucket(
    head_size: int, keys: int, bucket: int, factor: float, is_causal: bool
):
    """No code for adaptive weights is compiled for the bucket of fewer keys, tiles.few.

    And arrays shorter than tiles.SHORT have a tile of their own there.
    """
    assert hopper_forward_tile(head_size).few == (1536 if head_size == 64 else 1152)
    seeds = jax.random.split(jax.random.key(0), 3)
    query, key, value = (
        jax.random.normal(seed, (1, bucket, 2, head_size), "bfloat16") for seed in seeds
    )
    settings = Settings(scale=factor * head_size**-0.5, is_causal=is_causal)

    def output(padded: int) -> jax.Array:
        lengths = {"query_lengths": jnp.array([200]), "key_lengths": jnp.array([keys])}
        arrays = (x[:, :padded] for x in (query, key, value))
        return hopper_launch.forward(Operands(*arrays, **lengths), settings)[:, :200]

    np.testing.assert_array_equal(output(keys), output(bucket))
