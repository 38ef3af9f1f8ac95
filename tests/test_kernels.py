"""The device kernels' logic, in Triton's interpreter: forward.py, backward.py, tile_math.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sigjax.numerics import Case

LENGTHS = ((40, 45), (33, 0), (0, 31), (1, 32))
CASES = [
    Case("float32", 16, 40, 45, 2, is_causal=False, biases=True, lengths=LENGTHS),
    Case("float32", 16, 40, 45, 2, is_causal=True, biases=True, lengths=LENGTHS),
    Case("float32", 24, 40, 45, 1, is_causal=False),
    Case("float32", 16, 64, 64, 1, is_causal=True),
    Case("float16", 16, 40, 45, 1, is_causal=True, lengths=LENGTHS),
    Case("float16", 24, 33, 64, 2, is_causal=False, biases=True),
    # One running float32 sum over the head, or over the keys, would break the rule.
    Case("float32", 256, 67, 1, is_causal=True, biases=True),
    Case("float32", 64, 16, 3000),
]


@pytest.fixture(scope="module")
def failures() -> dict[str, list[str]]:
    """What each case got wrong, from one process that interprets all three kernels."""
    cases = [vars(case) for case in CASES]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("interpreted_kernels.py"))],
        input=json.dumps(cases),
        env={**os.environ, "TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES, ids=[case.label for case in CASES])
def test_interpreted_kernels_keep_the_tolerance_rule(case: Case, failures: dict[str, list[str]]):
    assert failures[case.label] == []
