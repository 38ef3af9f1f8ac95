"""A sequence sharded over devices gives what one device gives; on eight simulated devices."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType

import sigjax
from tests.context_parallel_cases import VARIANTS
from tests.other_process import OtherProcess

MODULE = "tests.context_parallel_cases"
CASES = [
    *(
        (variant, devices, "Auto")
        for variant in ("lengths", "causal lengths")
        for devices in (2, 8)
    ),
    *((variant, 4, "Auto") for variant in VARIANTS),
    ("causal lengths", 1, "Auto"),
    ("lengths", 4, "Explicit"),
]


@pytest.mark.parametrize("case", CASES, ids=["-".join(map(str, case)) for case in CASES])
def test_forward_and_backward_equal_one_device(
    case: tuple[str, int, str], eight_devices: OtherProcess
):
    problem = eight_devices.check(MODULE, "equals_one_device", *case)
    assert problem is None, problem


@pytest.mark.parametrize(
    ("dtype", "order"), [("bfloat16", "causal"), ("float16", "full"), ("float32", "full")]
)
def test_output_and_gradients_keep_the_tolerance_rule(
    dtype: str, order: str, eight_devices: OtherProcess
):
    problem = eight_devices.check(MODULE, "keeps_the_tolerance_rule", dtype, order)
    assert problem is None, problem


CLAIMS = {
    "batch and heads may be sharded too": ("Auto",),
    "batch and heads may be sharded too, explicit": ("Explicit",),
    "only blocks travel": ("plain",),
    "only blocks travel, causal": ("causal",),
    "a block is sent before the last is computed with": (),
    "memory is that of a block": (),
    "a mapped ring equals rings one by one": (),
    "second derivatives equal one device": (),
    "triton lowers with its kernels": (),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_ring(claim: str, eight_devices: OtherProcess):
    function = claim.split(",")[0].replace(" ", "_")
    problem = eight_devices.check(MODULE, function, *CLAIMS[claim])
    assert problem is None, problem


MESH = jax.make_mesh((1, 1), ("s", "n"), axis_types=(AxisType.Auto,) * 2)
X = jnp.ones((2, 6, 4, 8))
REFUSED = {
    "no such axis": ({"axis_name": "t"}, ValueError, "axis_name must be an axis of mesh"),
    "no such batch axis": (
        {"batch_axis_name": "b"},
        ValueError,
        "batch_axis_name must be an axis of mesh",
    ),
    "one axis twice": ({"head_axis_name": "s"}, ValueError, "must differ"),
    "odd length": (
        {"query": X[:, :5], "key": X[:, :5], "value": X[:, :5], "is_causal": True},
        ValueError,
        "query must have T divisible by 2 .* got T = 5",
    ),
    "causal cross attention": (
        {"query": X[:, :4], "is_causal": True},
        NotImplementedError,
        "T = 4 and S = 6",
    ),
    "unbatched": (
        {"query": X[0], "key": X[0], "value": X[0]},
        ValueError,
        r"query must have shape \[B, T, N, H\]",
    ),
    "fast_sigmoid": ({"fast_sigmoid": 1}, TypeError, "fast_sigmoid must be a Python bool, got int"),
    "unknown implementation": ({"implementation": "fast"}, ValueError, "implementation must be"),
}


@pytest.mark.parametrize(("given", "error", "text"), REFUSED.values(), ids=list(REFUSED))
def test_what_does_not_fit_the_mesh_is_refused(given: dict, error: type[Exception], text: str):
    arguments: dict[str, Any] = {
        "query": X,
        "key": X,
        "value": X,
        "mesh": MESH,
        "axis_name": "s",
        **given,
    }
    with pytest.raises(error, match=text):
        sigjax.context_parallel_attention(**arguments)
