"""The kernels with arguments that concern single pairs, in Triton's interpreter: pairs.py."""

import pytest

from tests.other_process import OtherProcess

# Of a bias and a mask: one whole tile and one at the edge, of queries and of keys.
SMALL = {"length": 40, "key_length": 45}
FOUR_AXES = (2, 4, 40, 45)
# Heads are grouped but in those of "groups": 1, which take half as long.
CASES: dict[str, dict] = {
    "bias-all-axes": {**SMALL, "bias": FOUR_AXES},
    "bias-per-head-aligned": {
        "groups": 1, "bias": (1, 2, 40, 48), "biases": True, "length": 40, "key_length": 48,
    },
    "bias-per-key": {**SMALL, "groups": 1, "bias": (2, 1, 1, 45), "lengths": True},
    "bias-per-query": {**SMALL, "groups": 1, "bias": (1, 1, 40, 1), "is_causal": True},
    "bias-one-number": {**SMALL, "groups": 1, "bias": (1, 1, 1, 1)},
    "mask-all-axes": {**SMALL, "mask": FOUR_AXES},
    "mask-per-pair": {
        **SMALL, "groups": 1, "mask": (1, 1, 40, 45), "lengths": True, "biases": True,
    },
    "mask-per-key-causal": {**SMALL, "groups": 1, "mask": (2, 1, 1, 45), "is_causal": True},
    "bias-and-mask": {**SMALL, "bias": (2, 1, 40, 45), "mask": (1, 4, 1, 45)},
    "window-both": {"window": (7, 3)},
    "window-of-one": {"groups": 1, "window": (0, 0)},
    "window-left": {"groups": 1, "window": (40, 500), "lengths": True},
    "window-right": {"groups": 1, "window": (500, 33)},
    "window-causal": {"groups": 1, "window": (20, 5), "is_causal": True},
    "window-wider-than-all": {"groups": 1, "window": (500, 500)},
    "window-few-keys": {"groups": 1, "window": (3, 3), "key_length": 20},
    "segments": {"segments": (31, 1, 30), "key_segments": (3, 40, 38)},
    "segments-as-long-as-tiles": {"groups": 1, "segments": (32, 32), "key_segments": (64, 26)},
    "segments-causal": {"groups": 1, "segments": (20, 45), "is_causal": True, "key_length": 70},
    "segments-lengths-biases": {
        "groups": 1, "segments": (10, 25, 30), "lengths": True, "biases": True,
    },
    "segments-window-bias": {"segments": (40, 30), "window": (5, 9), "bias": (1, 4, 70, 90)},
    "segments-with-gaps": {
        "groups": 1, "segments": (21, 14, 9), "key_segments": (30, 5, 28), "gap": 7,
    },
    "segments-in-unlike-order": {
        "groups": 1, "segments": (30, 20, 10), "turned_keys": True, "lengths": True,
    },
    "segment-without-keys": {"groups": 1, "segments": (30, 20, 20), "key_segments": (90,)},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_interpreted_kernels_keep_the_tolerance_rule(case: dict, interpreter: OtherProcess):
    assert interpreter.check("tests.interpreted_kernels", "check_pairs", case) is None


@pytest.mark.parametrize("shape", [(2, 1, 70, 90), (1, 4, 1, 90)], ids=["matrix", "per-key"])
def test_a_mask_hides_nan_logits_and_keeps_those_that_take_part(
    shape: tuple[int, ...], interpreter: OtherProcess
):
    checked = interpreter.check("tests.interpreted_kernels", "check_masked_nan", list(shape))
    assert checked is None
