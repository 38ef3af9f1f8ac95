"""The op keeps its contract: numbers, padding, invariance; "xla" here, "triton" on a GPU."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sigjax
from sigjax import numerics
from sigjax.numerics import Case
from tests import definition

OPS = {name: partial(sigjax.sigmoid_attention, implementation=name) for name in ("xla", "triton")}
implementations = pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("triton", marks=pytest.mark.gpu)]
)


def run_plain(case: Case, inputs: numerics.Named) -> numerics.Named:
    """numerics.run_plain, sooner compiled."""
    window = numerics.WINDOW if case.extra == "window" else None
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return definition.results(
            inputs, scale=case.scale, is_causal=case.is_causal, local_window_size=window
        )


def cases(selected: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", selected, ids=[case.label for case in selected])


def cases_of_each(xla: list[Case], triton: list[Case]) -> pytest.MarkDecorator:
    """Those of "xla" are programs to compile: some values go in turn, where "triton" has all."""
    params = [
        pytest.param(case, name, marks=marks, id=f"{case.label}-{name}")
        for name, marks, selected in (("xla", (), xla), ("triton", pytest.mark.gpu, triton))
        for case in selected
    ]
    return pytest.mark.parametrize(("case", "implementation"), params)


def has_its_turn(case: Case) -> bool:
    """Of the numeric grid, whether "xla" has the case too."""
    turn = numerics.DTYPES.index(case.dtype)
    if case.lengths is None:
        # Half of these sequences have heads of 64, the others of 256 and are causal.
        shape = case.length, case.key_length
        if shape not in numerics.FULL_LENGTHS:
            return True
        return (turn + numerics.FULL_LENGTHS.index(shape)) % 2 == case.is_causal
    # There are no tiles: head sizes of 96 and 128 are nothing that 64 is not.
    if case.head_size == 16:
        return case.groups == 2 or not case.biases or case.dtype == "float32"
    return case.head_size == 64


GRID = numerics.numeric_grid()


@cases_of_each([case for case in GRID if has_its_turn(case)], GRID)
def test_output_and_every_gradient_keep_the_tolerance_rule(case: Case, implementation: str):
    inputs = numerics.make_inputs(case)
    got = numerics.run(OPS[implementation], case, inputs)
    wrong = numerics.violations(got, numerics.exact(case, inputs), run_plain(case, inputs))
    assert not wrong, "\n".join(wrong)


@implementations
@cases(numerics.extended_grid())
def test_bias_mask_window_and_segments_keep_the_tolerance_rule(case: Case, implementation: str):
    inputs = numerics.make_inputs(case)
    got = numerics.run(OPS[implementation], case, inputs)
    wrong = numerics.violations(got, numerics.exact(case, inputs), run_plain(case, inputs))
    assert not wrong, "\n".join(wrong)


@implementations
@pytest.mark.parametrize("poison", [np.nan, np.inf], ids=["nan", "inf"])
@cases([case for case in numerics.extended_grid() if case.extra == "segments"][::4])
def test_poison_outside_of_every_segment_changes_no_bit(
    case: Case, poison: float, implementation: str
):
    clean = numerics.make_inputs(case)
    dirty = {name: x.copy() for name, x in clean.items()}
    outside = {side: clean[f"{side}_segment_ids"] <= 0 for side in ("query", "key_value")}
    for name in ("query", "cotangent", "key", "value"):
        side = "query" if name in ("query", "cotangent") else "key_value"
        dirty[name][outside[side]] = poison
    want, got = (numerics.run(OPS[implementation], case, inputs) for inputs in (clean, dirty))
    for name, x in got.items():
        assert np.array_equal(x, want[name]), name
    for name, side in (("output", "query"), ("query", "query"), ("key", "key_value")):
        assert not got[name][outside[side]].any(), name


def poisoned(*head_sizes: int) -> list[Case]:
    return [
        Case(dtype, head_size, *numerics.BUCKET, 2, causal, True, lengths)
        for dtype in numerics.DTYPES
        for head_size in head_sizes
        for causal in (False, True)
        for lengths in numerics.PADDED_LENGTHS[:7]
    ]


# The grid has compiled "xla" for heads of 16.
@pytest.mark.parametrize("poison", [np.nan, np.inf], ids=["nan", "inf"])
@cases_of_each(poisoned(16, 64), poisoned(64, 128))
def test_poison_in_the_padding_changes_no_bit(case: Case, poison: float, implementation: str):
    clean = numerics.make_inputs(case)
    dirty = {name: x.copy() for name, x in clean.items()}
    assert case.lengths is not None
    for row, (length, keys) in enumerate(case.lengths):
        for name in ("query", "cotangent"):
            dirty[name][row, length:] = poison
        for name in ("key", "value", "key_bias"):
            dirty[name][row, keys:] = -poison
    want = numerics.run(OPS[implementation], case, clean)
    got = numerics.run(OPS[implementation], case, dirty)
    for name, x in got.items():
        assert np.isfinite(x.astype(np.float32)).all(), name
        assert np.array_equal(x, want[name]), name
    for row, (length, keys) in enumerate(case.lengths):
        for name in ("output", "query"):
            assert not got[name][row, length:].any(), name
        for name in ("key", "value", "key_bias"):
            assert not got[name][row, keys:].any(), name


def invariant(*head_sizes: int, in_turn: bool) -> list[Case]:
    return [
        Case(dtype, head_size, length, length, 2, causal, lengths=((length, length),))
        for i, dtype in enumerate(numerics.DTYPES)
        for head_size in head_sizes
        for causal in (False, True)
        for j, length in enumerate((1, 31, 64, 129, 150))
        if not in_turn or (i + j) % 2 == causal
    ]


@cases_of_each(invariant(64, in_turn=True), invariant(64, 128, in_turn=False))
def test_a_sequence_ignores_its_bucket_and_its_neighbours(case: Case, implementation: str):
    """Alone at its own length without lengths, and third of four in a bucket of 192."""
    alone = numerics.make_inputs(case)
    length = case.length
    del alone["query_seq_lengths"], alone["key_value_seq_lengths"]
    crowd_lengths = ((192, 192), (7, 7), (length, length), (0, 0))
    crowd_case = Case(case.dtype, case.head_size, 192, 192, 2, case.is_causal, False, crowd_lengths)
    crowd = numerics.make_inputs(crowd_case, seed=1)
    for name in ("query", "key", "value", "cotangent"):
        crowd[name][2, :length] = alone[name][0]
    want = numerics.run(OPS[implementation], case, alone)
    got = numerics.run(OPS[implementation], crowd_case, crowd)
    exact, plain = numerics.exact(case, alone), run_plain(case, alone)
    for name in ("output", "query", "key", "value"):
        ours, theirs = got[name][2, :length], want[name][0]
        if implementation == "triton":
            assert np.array_equal(ours, theirs), name
        else:
            # The order of the sums depends on the bucket: what the rule allows one, it allows both.
            magnitude = float(np.abs(exact[name]).max())
            allowed = 2 * numerics.tolerance(exact[name], plain[name], magnitude)
            assert np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max() <= allowed, (
                name
            )


@implementations
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_error_at_16384_keys_is_at_most_the_plain_definitions(dtype: str, implementation: str):
    case = Case(dtype, 64, 64, 16384)
    inputs = numerics.make_inputs(case)
    want = numerics.exact(case, inputs)["output"]
    got = numerics.run(OPS[implementation], case, inputs)["output"]
    plain = run_plain(case, inputs)["output"]

    def error(x: np.ndarray) -> float:
        return float(np.sqrt(np.mean((x.astype(np.float64) - want) ** 2)))

    assert error(got) <= 1.1 * error(plain)


@implementations
@pytest.mark.parametrize("dtype", numerics.DTYPES)
def test_each_weight_is_accurate_from_one_down_to_1e_6(dtype: str, implementation: str):
    """One key and value 1: the output is the weight of its logit, read off through the bias."""
    logits = np.linspace(-13.8, 13.8, 257, dtype=np.float32)
    one = jnp.ones((257, 1, 1, 64), dtype)
    output = OPS[implementation](
        jnp.zeros_like(one), jnp.zeros_like(one), one, sigmoid_bias=logits[:, None]
    )
    want = 1 / (1 + np.exp(-logits.astype(np.float64)))
    got = np.asarray(output[:, 0, 0, 0]).astype(np.float64)
    rounding = float(jnp.finfo(dtype).eps) / 2  # of the output itself
    # float16 cannot hold 1e-6 to 5e-4: its subnormals are 6e-8 apart.
    subnormal = 3e-8 if dtype == "float16" else 0.0
    assert np.all(np.abs(got - want) <= (5e-4 + rounding) * want + subnormal)


@implementations
@pytest.mark.parametrize("dtype", numerics.DTYPES)
def test_extreme_logits_saturate_and_nan_stays_nan(dtype: str, implementation: str):
    bias = np.array([1e4, -1e4, -np.inf, np.inf, np.nan], np.float32)
    x = jnp.ones((5, 3, 1, 16), dtype)
    output = np.asarray(OPS[implementation](x, x, x, sigmoid_bias=bias[:, None]), np.float32)
    for row, want in enumerate((3.0, 0.0, 0.0, 3.0, np.nan)):
        assert np.array_equal(output[row], np.full((3, 1, 16), want), equal_nan=True)


@implementations
def test_large_logits_keep_the_tolerance_rule(implementation: str):
    case = Case("bfloat16", 64, 130, 190, biases=True, scale=1.0)
    inputs = numerics.make_inputs(case)
    got = numerics.run(OPS[implementation], case, inputs)
    wrong = numerics.violations(got, numerics.exact(case, inputs), run_plain(case, inputs))
    assert not wrong, "\n".join(wrong)


@implementations
def test_small_float16_gradients_do_not_underflow(implementation: str):
    """A loss averaged over many tokens sends gradients near float16's smallest numbers."""
    case = Case("float16", 64, 128, 1024)
    inputs = numerics.make_inputs(case)
    inputs["cotangent"] = (inputs["cotangent"].astype(np.float32) * 2.0**-6).astype(np.float16)
    got = numerics.run(OPS[implementation], case, inputs)
    want = numerics.exact(case, inputs)
    for name in ("query", "key", "value"):
        error = got[name].astype(np.float64) - want[name]
        half_steps = np.abs(error) / (2.0**-11 * np.abs(want[name]) + 2.0**-25)
        assert half_steps.mean() < 4, name


@implementations
def test_unbatched_operands_equal_a_batch_of_one(implementation: str):
    x = jax.random.normal(jax.random.key(0), (33, 2, 32), jnp.float32)
    op = OPS[implementation]
    assert jnp.array_equal(op(x, x, x), op(x[None], x[None], x[None])[0])


@implementations
def test_lengths_beyond_the_array_count_as_full(implementation: str):
    x = jax.random.normal(jax.random.key(0), (1, 40, 2, 32), jnp.float32)
    op = OPS[implementation]
    lengths = jnp.array([99], jnp.int32)
    output = op(x, x, x, query_seq_lengths=lengths, key_value_seq_lengths=lengths)
    # Up to the last bits: without lengths the default bias is folded at compile time.
    assert jnp.allclose(output, op(x, x, x), rtol=1e-6, atol=1e-6)


def test_a_float_bias_equals_its_array():
    x = jax.random.normal(jax.random.key(0), (2, 9, 4, 16))
    arrays = [jnp.full(shape, -2.0) for shape in ((), (4,), (2, 1), (1, 4), (2, 4))]
    want = sigjax.sigmoid_attention(x, x, x, sigmoid_bias=-2.0)
    for array in arrays:
        assert jnp.array_equal(sigjax.sigmoid_attention(x, x, x, sigmoid_bias=array), want)


def test_the_default_bias_counts_only_valid_keys():
    x = jax.random.normal(jax.random.key(0), (2, 50, 1, 16))
    lengths = jnp.array([50, 20], jnp.int32)
    got = sigjax.sigmoid_attention(x, x, x, key_value_seq_lengths=lengths)
    bias = -jnp.log(lengths.astype(jnp.float32))[:, None]
    want = sigjax.sigmoid_attention(x, x, x, key_value_seq_lengths=lengths, sigmoid_bias=bias)
    assert jnp.array_equal(got, want)


BROADCAST = {
    "full": (2, 4, 30, 50),
    "per head": (1, 4, 1, 1),
    "per key": (2, 1, 1, 50),
    "per query": (1, 1, 30, 1),
    "two axes": (30, 50),
}


@implementations
@pytest.mark.parametrize("shape", BROADCAST.values(), ids=list(BROADCAST))
def test_a_broadcast_bias_and_its_gradient_keep_the_tolerance_rule(
    shape: tuple[int, ...], implementation: str
):
    rng = np.random.default_rng(0)
    shapes = {"query": (2, 30, 4, 16), "key": (2, 50, 2, 16), "value": (2, 50, 2, 16)}
    arrays = {name: rng.standard_normal(x) for name, x in {**shapes, "bias": shape}.items()}
    mask = rng.random((1, 4, 30, 1)) < 0.7

    def inputs(dtype: type) -> numerics.Named:
        floats = {name: x.astype(np.float32).astype(dtype) for name, x in arrays.items()}
        return {**floats, "mask": mask, "cotangent": np.ones(shapes["query"], dtype)}

    window: Any = {"local_window_size": (9, 4)}

    @jax.jit
    def run(floats: numerics.Named, cotangent: jax.Array) -> dict[str, jax.Array]:
        op = partial(OPS[implementation], mask=mask, **window)
        output, pullback = jax.vjp(lambda floats: op(**floats), floats)
        return {"output": output, **pullback(cotangent)[0]}

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        plain = definition.results(inputs(np.float32), **window)
        with jax.enable_x64(True):
            exact = definition.results(inputs(np.float64), **window)
    given = inputs(np.float32)
    got = jax.device_get(run({name: given[name] for name in arrays}, given["cotangent"]))
    wrong = numerics.violations(got, exact, plain)
    assert not wrong, "\n".join(wrong)
