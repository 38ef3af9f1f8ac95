"""The "xla" implementation's memory stays linear, whatever the block size."""

import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from sigjax import chunked, numerics, sigmoid_attention
from sigjax.numerics import Case

# Not getrusage: its maximum begins with that of the process that started this one.
PROGRAM = """
import jax, jax.numpy as jnp, sigjax
x = jax.random.normal(jax.random.key(0), (1, 16384, 2, 16), jnp.float32)
loss = lambda x: sigjax.sigmoid_attention(x, x, x, implementation="xla").sum()
gradient = jax.block_until_ready(jax.jit(jax.grad(loss))(x))
assert bool(jnp.isfinite(gradient).all())
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM:")))
"""


def test_16384_tokens_forward_and_backward_stay_under_2_gb():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) * 1024 < 2e9


@pytest.mark.parametrize(
    ("dtype", "precision", "wanted"),
    [
        ("float32", None, "HIGHEST"),
        ("float32", "high", "HIGH"),
        ("float32", jax.lax.Precision.DEFAULT, "DEFAULT"),
        ("bfloat16", "high", ""),
    ],
    ids=["float32", "high", "default", "bfloat16"],
)
def test_every_product_has_the_precision_that_was_asked_for(dtype, precision, wanted):
    x = jax.ShapeDtypeStruct((1, 40, 2, 16), dtype)

    def loss(x):
        y = sigmoid_attention(x, x, x, implementation="xla", precision=precision)
        return y.astype(jnp.float32).sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(x))
    assert set(re.findall(r"precision=\(?Precision\.(\w+)", text)) == set(filter(None, [wanted]))


@pytest.mark.parametrize("limit", [1, 2**14, 2**25], ids=["smallest", "middle", "one"])
def test_the_block_size_changes_nothing_but_rounding(limit: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunked, "BLOCK_ELEMENTS", limit)
    jax.clear_caches()  # the op's own jit would serve what was traced for another limit
    case = Case(
        "float32", 16, 40, 300, 2, is_causal=True, biases=True, lengths=((40, 300), (9, 65))
    )
    inputs = numerics.make_inputs(case)
    xla = partial(sigmoid_attention, implementation="xla")
    got = numerics.run(xla, case, inputs)
    assert not numerics.violations(
        got, numerics.exact(case, inputs), numerics.run_plain(case, inputs)
    )


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 1, 1, 5), 64),
        ((1, 1, 10, 65), 128),
        ((1, 2, 16384, 16384), 1024),
        ((64, 16, 4096, 4096), 64),
    ],
)
def test_a_block_is_a_power_of_two_within_the_bound(shape: tuple[int, ...], size: int):
    assert chunked.block_size(*shape) == size


def test_float64_operands_are_computed_in_float64():
    with jax.enable_x64(True):
        case = Case("float64", 16, 20, 30, biases=True)
        inputs = numerics.make_inputs(case)
        got = numerics.run(partial(sigmoid_attention, implementation="xla"), case, inputs)
        want = numerics.exact(case, inputs)
        assert got["output"].dtype == jnp.float64
        for name in ("output", "query", "key", "value"):
            assert abs(got[name] - want[name]).max() < 1e-13 * abs(want[name]).max(), name
