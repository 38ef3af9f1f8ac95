"""The tile table covers what the kernels serve."""

from dataclasses import replace

import pytest

from sigjax.kernels.tiles import (
    SHORT,
    Kernel,
    Pairs,
    Tile,
    choose_tile,
    head_block,
    hopper_forward_tile,
)

KERNELS: tuple[Kernel, ...] = (
    "forward", "query_gradient", "key_value_gradient", "bias_gradient",
)  # fmt: skip


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_head_size_has_a_tile(kernel: Kernel, itemsize: int, capability: int):
    for head_size in range(16, 257):
        for pairs in (None, "bias", "mask", "segments"):
            tile = choose_tile(kernel, head_size, itemsize, capability, pairs)
            assert isinstance(tile, Tile)


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("pairs", [None, "bias", "mask"])
def test_fast_sigmoid_changes_weights_and_counter_of_a_hopper_tile_alone(
    head_size: int, pairs: Pairs | None
):
    exact, fast = (
        hopper_forward_tile(head_size, fast_sigmoid=x, pairs=pairs) for x in (False, True)
    )
    assert exact.weights != "tanh"
    # Dense calls with it have not been timed by a counter.
    assert fast == replace(exact, weights="tanh", counts="lengths")


@pytest.mark.parametrize("capability", [86, 90])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_bias_and_a_mask_have_the_same_portable_tile(kernel: Kernel, capability: int):
    for head_size in (64, 128):
        bias, mask = (
            choose_tile(kernel, head_size, 2, capability, pairs) for pairs in ("bias", "mask")
        )
        assert bias == mask


def test_short_arrays_have_a_tile_of_their_own_at_64_and_with_exact_weights_alone():
    short = hopper_forward_tile(64, short=True)
    assert (short.consumers, short.weights) == (2, "pair")
    long = hopper_forward_tile(64)
    assert (short.block_q, short.block_k) == (long.block_q, long.block_k)
    assert long.few >= SHORT
    assert hopper_forward_tile(128, short=True) == hopper_forward_tile(128)
    fast = hopper_forward_tile(64, fast_sigmoid=True)
    assert hopper_forward_tile(64, fast_sigmoid=True, short=True) == fast
    bias = hopper_forward_tile(64, pairs="bias")
    assert hopper_forward_tile(64, pairs="bias", short=True) == bias


@pytest.mark.parametrize("head_size", [64, 128])
def test_weights_of_packed_rows_are_not_decided_together(head_size: int):
    assert hopper_forward_tile(head_size, pairs="segments").weights == "pair"
    fast = hopper_forward_tile(head_size, fast_sigmoid=True, pairs="segments")
    assert fast.weights == "tanh"


@pytest.mark.parametrize(
    ("head_size", "columns"), [(1, 16), (16, 16), (17, 32), (96, 128), (256, 256)]
)
def test_a_head_block_is_the_power_of_two_that_holds_it(head_size: int, columns: int):
    assert head_block(head_size) == columns


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((48, 64, 4, 2), "block_q must be a power of two of at least 16, got 48"),
        ((64, 8, 4, 2), "block_k must be a power of two of at least 16, got 8"),
        ((64, 64, 3, 2), "num_warps must be a power of two of at least 1, got 3"),
        ((64, 64, 4, 0), "num_stages must be at least 1, got 0"),
    ],
    ids=["block_q", "block_k", "num_warps", "num_stages"],
)
def test_a_wrong_tile_is_refused(sizes: tuple[int, int, int, int], message: str):
    with pytest.raises(ValueError, match=message):
        Tile(*sizes)


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("keys", [800, 1500, 4096])
def test_a_narrow_window_is_exact_whatever_the_bucket(head_size: int, keys: int):
    tile = hopper_forward_tile(head_size)
    assert tile.for_keys(keys, window=1535).weights == "pair"
    wide = "pair" if keys < tile.few else "adaptive"
    assert tile.for_keys(keys, window=1536).weights == wide


@pytest.mark.parametrize(
    ("keys", "weights", "turns"),
    [
        (1, "pair", "always"),
        (1151, "pair", "always"),
        (1152, "adaptive", "never"),
        (3071, "adaptive", "never"),
        (3072, "adaptive", "exact"),
    ],
)
def test_at_128_keys_decide_on_weights_and_turns(keys: int, weights: str, turns: str):
    tile = hopper_forward_tile(128).for_keys(keys)
    assert (tile.weights, tile.early, tile.turns) == (weights, weights == "adaptive", turns)
