"""The device kernels' logic, in Triton's interpreter: forward.py, backward.py, tile_math.py."""

from dataclasses import asdict

import pytest

from sigjax.numerics import Case
from tests.other_process import OtherProcess

LENGTHS = ((40, 45), (33, 0), (0, 31), (1, 32))
CASES = [
    Case("float32", 16, 40, 45, 2, is_causal=False, biases=True, lengths=LENGTHS),
    Case("float32", 16, 40, 45, 2, is_causal=True, biases=True, lengths=LENGTHS),
    Case("float32", 24, 40, 45, 1, is_causal=False),
    Case("float32", 16, 64, 64, 1, is_causal=True),
    Case("float16", 16, 40, 45, 1, is_causal=True, lengths=LENGTHS),
    Case("float16", 24, 33, 64, 2, is_causal=False, biases=True),
    # One running float32 sum over the head would break the rule.
    Case("float32", 256, 67, 1, is_causal=True, biases=True),
]


@pytest.mark.parametrize("case", CASES, ids=[case.label for case in CASES])
def test_interpreted_kernels_keep_the_tolerance_rule(case: Case, interpreter: OtherProcess):
    assert interpreter.check("tests.interpreted_kernels", "check_case", asdict(case)) is None
