"""A bias and a mask of single pairs in the Hopper backward kernel: hopper_backward_matrix.py."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_triton import triton_lib

from sigjax import numerics, reference
from sigjax.attention import sigmoid_attention
from sigjax.checks import check
from sigjax.choice import compile_for
from sigjax.kernels import hopper_choice, hopper_matrices, launch
from sigjax.kernels.hopper_backward import hopper_backward_kernel
from sigjax.numerics import Case, make_inputs
from sigjax.operands import Operands, Settings
from tests import definition, emulated_hopper
from tests.in_turn import HEAD_SIZES, in_turn

BACKWARD = "hopper_backward_kernel"
KERNELS = ["key_value_gradient_kernel", "query_gradient_kernel"]  # the portable ones
MOST_SHARED_MEMORY = 232_448  # bytes of a program, sm_90


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both Hopper kernels serve what they can, as by default."""
    monkeypatch.delenv(hopper_choice.VARIABLE, raising=False)


@dataclass(frozen=True)
class Matrix:
    """A call with a bias or a mask, sequences of 2 key heads.

    Attributes:
        bias: axes of [B, N, T, S] that the bias has; or None.
        mask: likewise.
        length: T.
        key_length: S.
        batch: B.
        groups: query heads a key head serves.
        lengths: (query length, key length) of each sequence; None where all rows are full.
        is_causal: as in the op.
        window: (left, right); or None.
        biases: whether sigmoid_bias and key_bias are given.
    """

    bias: str | None = None
    mask: str | None = None
    length: int = 200
    key_length: int = 280
    batch: int = 2
    groups: int = 1
    lengths: tuple[tuple[int, int], ...] | None = None
    is_causal: bool = False
    window: tuple[int, int] | None = None
    biases: bool = False

    def inputs(self, dtype: str, head_size: int) -> dict[str, np.ndarray]:
        """The op's arrays and the output's cotangent, by name."""
        # make_inputs has as many sequences as lengths: these are full.
        full = ((self.length, self.key_length),) * self.batch
        case = Case(dtype, head_size, self.length, self.key_length, self.groups, lengths=full)
        inputs = make_inputs(replace(case, biases=self.biases))
        del inputs["query_seq_lengths"], inputs["key_value_seq_lengths"]
        rng = np.random.default_rng(7)
        if self.lengths is not None:
            pairs = np.array(self.lengths, np.int32)
            inputs |= {"query_seq_lengths": pairs[:, 0], "key_value_seq_lengths": pairs[:, 1]}
        if self.bias is not None:
            bias = 2 * rng.standard_normal(self.shape(self.bias))
            inputs["bias"] = bias.astype(inputs["query"].dtype)
        if self.mask is not None:
            inputs["mask"] = rng.random(self.shape(self.mask)) < 0.6
        return inputs

    def shape(self, axes: str) -> tuple[int, ...]:
        """Of an array with some of the axes of [B, N, T, S]."""
        sizes = (self.batch, 2 * self.groups, self.length, self.key_length)
        return tuple(n if name in axes else 1 for name, n in zip("BNTS", sizes, strict=True))


UNEQUAL = ((190, 131), (77, 280))
CASES = {
    "bias": Matrix("NTS"),
    "bias-of-all": Matrix("BNTS"),
    "bias-of-sequences": Matrix("BTS"),
    "bias-of-one": Matrix("TS"),
    "bias-of-one-of-four": Matrix("TS", batch=4),
    "bias-three-sequences": Matrix("NTS", batch=3),
    "bias-whole-blocks": Matrix("NTS", length=128, key_length=256),
    "bias-few": Matrix("NTS", length=2, key_length=8),
    "bias-lengths": Matrix("NTS", lengths=UNEQUAL),
    "bias-of-all-lengths": Matrix("BNTS", lengths=UNEQUAL),
    "bias-lengths-order": Matrix("TS", lengths=((1, 8), (200, 280), (0, 5), (65, 63)), batch=4),
    "bias-causal": Matrix("NTS", is_causal=True),
    "bias-window-lengths": Matrix("NTS", window=(40, 25), lengths=UNEQUAL),
    "bias-grouped": Matrix("NTS", groups=2),
    "bias-grouped-lengths-causal": Matrix("BTS", groups=2, lengths=UNEQUAL, is_causal=True),
    "bias-biases": Matrix("NTS", biases=True, lengths=UNEQUAL),
    "mask": Matrix(mask="BTS"),
    "mask-of-all": Matrix(mask="BNTS"),
    "mask-of-heads": Matrix(mask="NTS", groups=2),
    "mask-of-one": Matrix(mask="TS"),
    "mask-of-keys": Matrix(mask="BS"),
    "mask-of-queries": Matrix(mask="BT"),
    "mask-odd": Matrix(mask="BTS", length=77, key_length=131),
    "mask-one-query": Matrix(mask="BTS", length=1, key_length=131),
    "mask-lengths": Matrix(mask="BTS", lengths=UNEQUAL),
    "mask-causal-lengths": Matrix(mask="BTS", lengths=UNEQUAL, is_causal=True),
    "mask-window": Matrix(mask="TS", window=(40, 25)),
    "mask-grouped-window-lengths": Matrix(
        mask="BTS", groups=2, window=(40, 25), lengths=UNEQUAL, length=333
    ),
    "mask-biases": Matrix(mask="BTS", biases=True, lengths=UNEQUAL),
    "mask-bias-of-keys": Matrix("BNS", mask="BTS", lengths=UNEQUAL),
    "mask-bias-of-keys-biases": Matrix("NS", mask="NTS", biases=True, window=(40, 25)),
}


def operands_of(inputs: dict[str, np.ndarray], case: Matrix) -> tuple[Operands, Settings]:
    """The op's arguments as its checks hand them on."""
    given: dict[str, Any] = dict.fromkeys(("bias", "mask", "sigmoid_bias", "key_bias"))
    given |= dict.fromkeys(("query_seq_lengths", "key_value_seq_lengths", "scale"))
    given |= inputs | {"is_causal": case.is_causal, "local_window_size": case.window}
    del given["cotangent"]
    return check(**given)


def smaller(case: Matrix) -> Matrix:
    """The case with at most two blocks of queries and 2 more, and one of keys and 8 more."""
    sizes = case.length, case.key_length
    if sizes == (128, 256):  # whole blocks alone
        return case
    length, key_length = min(sizes[0], 130), min(sizes[1], 136)
    lengths = case.lengths and tuple(
        (
            x if x <= length else x * length // sizes[0],
            y if y <= key_length else y * key_length // sizes[1],
        )
        for x, y in case.lengths
    )
    return replace(case, length=length, key_length=key_length, lengths=lengths)


@in_turn("case", CASES, head_size=HEAD_SIZES)
def test_emulated_gradients_are_those_of_the_definition_whatever_padding_holds(
    head_size: int, case: Matrix
):
    case = smaller(case)
    inputs = case.inputs("float32", head_size)
    operands, settings = operands_of(inputs, case)
    cotangent = jnp.asarray(inputs["cotangent"])
    names = ["query", "key", "value", *["sigmoid_bias", "key_bias"] * case.biases]
    if case.bias is not None and "T" not in case.bias:
        names.append("bias")  # of pairs its own kernel has it

    want = definition.gradients(operands, settings, cotangent, names)
    got, _ = emulated_hopper.backward(operands, settings, cotangent)
    for name in names:
        # Float32 sums in another order.
        largest = float(jnp.abs(want[name]).max())
        np.testing.assert_allclose(
            getattr(got, name), want[name], rtol=0, atol=2e-5 * max(1, largest), err_msg=name
        )
    if case.lengths is not None:
        dirty, gradient = poisoned(operands, cotangent)
        again, _ = emulated_hopper.backward(dirty, settings, gradient)
        for name in names:
            assert jnp.array_equal(getattr(again, name), getattr(got, name)), name


def poisoned(operands: Operands, cotangent: jax.Array) -> tuple[Operands, jax.Array]:
    """Operands and cotangent with NaN and inf in what no pair within the lengths has."""
    rows = reference.valid_queries(operands)
    columns = reference.valid_keys(operands)
    dirty = operands._replace(
        query=jnp.where(rows[..., None, None], operands.query, jnp.nan),
        key=jnp.where(columns[..., None, None], operands.key, jnp.inf),
        value=jnp.where(columns[..., None, None], operands.value, jnp.nan),
    )
    pairs = rows[:, None, :, None] & columns[:, None, None, :]
    for name, value in (("bias", jnp.nan), ("mask", True)):
        x = getattr(operands, name)
        if x is not None:
            # Of an array that sequences share only what all of them lack.
            kept = pairs if x.shape[0] > 1 else pairs.any(0, keepdims=True)
            x = jnp.where(kept, x, value) if x.shape[2:] == pairs.shape[2:] else x
            dirty = dirty._replace(**{name: x})
    return dirty, jnp.where(rows[..., None, None], cotangent, -jnp.inf)


@pytest.mark.parametrize("head_size", [64, 128], ids=["H64", "H128"])
def test_emulated_pairs_that_a_mask_excludes_have_no_part_whatever_their_logits_are(
    head_size: int,
):
    case = Matrix(mask="BTS", biases=True)
    inputs = case.inputs("float32", head_size)
    inputs["mask"][..., 17] = False
    inputs["mask"][..., 9, :] = False
    clean, settings = operands_of(inputs, case)
    cotangent = jnp.asarray(inputs["cotangent"])
    bias = clean.key_bias
    assert bias is not None
    # Key 25 shares its reciprocals with key 17.
    dirty = clean._replace(key_bias=bias.at[:, 17].set(jnp.nan))
    want, _ = emulated_hopper.backward(clean, settings, cotangent)
    got, _ = emulated_hopper.backward(dirty, settings, cotangent)
    for name in ("query", "key", "value", "key_bias", "sigmoid_bias"):
        assert jnp.array_equal(getattr(got, name), getattr(want, name)), name
    for x in (got.key, got.value):
        assert not x[:, 17].any()
    assert not got.query[:, 9].any()
    # Nor does a gradient that is infinite: its products with the excluded keys' weights are 0.
    endless, _ = emulated_hopper.backward(
        clean._replace(value=clean.value.at[:, 17].set(jnp.inf)), settings, cotangent
    )
    for name in ("query", "key_bias"):
        assert jnp.array_equal(getattr(endless, name), getattr(want, name)), name


def served(
    case: Matrix, monkeypatch: pytest.MonkeyPatch, *, dtype: str = "bfloat16", head_size: int = 64,
    bias_dtype: str | None = None, segments: bool = False, compiles: bool = False,
    **settings: Any,
) -> list[str]:  # fmt: skip
    """Which kernels a backward pass calls on sm_90; with compiles, each is compiled too."""

    def shape(sizes: tuple[int, ...] | None, dtype: str) -> Any:
        return None if sizes is None else jax.ShapeDtypeStruct(sizes, dtype)

    heads = 2 * case.groups
    query = shape((case.batch, case.length, heads, head_size), dtype)
    key = shape((case.batch, case.key_length, 2, head_size), dtype)
    ids = {"query": (case.batch, case.length), "key": (case.batch, case.key_length)}
    operands = Operands(
        query, key, key,
        bias=shape(None if case.bias is None else case.shape(case.bias), bias_dtype or dtype),
        mask=shape(None if case.mask is None else case.shape(case.mask), "bool"),
        sigmoid_bias=shape((case.batch, heads) if case.biases else None, "float32"),
        key_bias=shape((case.batch, case.key_length) if case.biases else None, "float32"),
        query_lengths=shape((case.batch,) if case.lengths else None, "int32"),
        key_lengths=shape((case.batch,) if case.lengths else None, "int32"),
        query_segments=shape(ids["query"] if segments else None, "int32"),
        key_segments=shape(ids["key"] if segments else None, "int32"),
    )  # fmt: skip
    names: list[str] = []
    call = launch.call

    def spy(kernel: Any, *arguments: Any, **options: Any) -> Any:
        names.append(kernel.__name__)
        return call(kernel, *arguments, **options)

    monkeypatch.setattr(launch, "call", spy)
    given = Settings(scale=0.125, is_causal=case.is_causal, window=case.window, **settings)
    with compile_for(90):
        traced = jax.jit(lambda o, g: launch.backward(o, given, g)).trace(operands, query)
        if compiles:
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
            assert text.count("triton_kernel_call") == len(names)
    monkeypatch.setattr(launch, "call", call)
    return sorted(name for name in names if name != "query_sums_kernel")


COMPILED = {  # with nothing besides they are compiled with less than these are
    "bias-lengths": Matrix("BTS", lengths=UNEQUAL),
    "bias-causal-grouped": Matrix("NTS", is_causal=True, groups=2),
    "bias-window-lengths-biases": Matrix("NTS", window=(9, 7), lengths=UNEQUAL, biases=True),
    "mask-lengths-grouped": Matrix(mask="BTS", lengths=UNEQUAL, groups=2),
    "mask-causal-lengths-biases": Matrix(mask="NTS", is_causal=True, lengths=UNEQUAL, biases=True),
    "mask-window": Matrix(mask="BS", window=(9, 7)),
}


# Each in one dtype, in turn: what a dtype changes is the same in all of them.
@in_turn("case", COMPILED, dtype=("bfloat16", "float16"), head_size=(64, 64, 128, 128))
def test_a_bias_and_a_mask_compile_and_are_served(
    head_size: int, dtype: str, case: Matrix, monkeypatch: pytest.MonkeyPatch
):
    expected = [BACKWARD] + ["hopper_bias_gradient_kernel"] * (case.bias is not None)
    compiled: list[tuple[int, str]] = []
    library = triton_lib.triton_kernel_call_lib
    kernel = library.TritonKernel

    def spy(name: str, num_warps: int, ctas: int, shared: int, ptx: str, *rest: Any) -> Any:
        compiled.append((shared, ptx))
        return kernel(name, num_warps, ctas, shared, ptx, *rest)

    monkeypatch.setattr(library, "TritonKernel", spy)
    # What an earlier test compiled is not compiled again.
    monkeypatch.delattr(hopper_backward_kernel, "_jT_kernel_cache", raising=False)
    names = served(case, monkeypatch, dtype=dtype, head_size=head_size, compiles=True)
    assert names == expected
    (found,) = ((shared, ptx) for shared, ptx in compiled if "hopper_backward_kernel" in ptx)
    shared, ptx = found
    assert shared <= MOST_SHARED_MEMORY
    # A bias is turned as it is loaded, eight by eight.
    assert ptx.count("ldmatrix.sync.aligned.m8n8.x4.trans") == 8 * (case.bias is not None)


SERVED: dict[str, tuple[Matrix, dict[str, Any]]] = {
    "bias": (Matrix("NTS"), {}),
    "mask": (Matrix(mask="BTS"), {}),
    "bias-of-another-dtype": (Matrix("NTS"), {"bias_dtype": "float16"}),
    "partial": (Matrix("NTS"), {"result_dtype": np.dtype("float32")}),
    "keys-of-any-number": (Matrix(mask="TS", key_length=131), {}),
    "one-query": (Matrix(mask="S", length=1), {}),
    "bias-of-one-query": (Matrix("NTS", length=1), {}),
    "bias-of-keys": (Matrix("NS"), {}),
    "bias-of-keys-mask": (Matrix("NS", mask="BTS"), {}),
}


@pytest.mark.parametrize(("case", "options"), SERVED.values(), ids=list(SERVED))
def test_these_are_served_too(
    case: Matrix, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    assert BACKWARD in served(case, monkeypatch, **options)


REFUSED: dict[str, tuple[Matrix, dict[str, Any]]] = {
    "float32": (Matrix("NTS"), {"bias_dtype": "float32"}),
    "rows-of-12-bytes": (Matrix("NTS", key_length=286), {}),
    "bias-of-queries": (Matrix("NT"), {}),
    "both": (Matrix("NTS", mask="BTS"), {}),
    "bias-segments": (Matrix("NTS"), {"segments": True}),
    "mask-segments": (Matrix(mask="BTS"), {"segments": True}),
    "deterministic": (Matrix("NTS"), {"deterministic": True}),
    "bias-of-keys-mask-segments": (Matrix("NS", mask="BTS"), {"segments": True}),
    "mask-grouped-biases": (Matrix(mask="BTS", groups=2, biases=True), {}),
    "mask-grouped-bias-of-keys": (Matrix("NS", mask="BTS", groups=2), {}),
}


@pytest.mark.parametrize(("case", "options"), REFUSED.values(), ids=list(REFUSED))
def test_other_calls_get_the_portable_kernels(
    case: Matrix, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    names = served(case, monkeypatch, **options)
    assert BACKWARD not in names
    assert set(KERNELS) <= set(names)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Matrix("BNTS", batch=4), None),
        (Matrix("NTS", batch=8), (4, 1)),
        (Matrix("NTS", batch=6), (2, 1)),
        (Matrix("NTS", batch=3), None),
        (Matrix("BTS", batch=4), (1, 2)),
        (Matrix("TS", batch=2), (2, 2)),
        (Matrix("TS", batch=4), (4, 1)),
        (Matrix(mask="TS", batch=4), None),
    ],
    ids=lambda x: str(x) if isinstance(x, tuple) else None,
)
def test_programs_that_share_a_bias_are_neighbours(case: Matrix, expected: tuple[int, int] | None):
    operands, _ = operands_of(case.inputs("float32", 64), case)
    assert hopper_matrices.neighbours(operands) == expected


def test_a_mask_is_a_bit_a_pair():
    case = Matrix(mask="BTS", length=77, key_length=131)
    inputs = case.inputs("float32", 64)
    operands, _ = operands_of(inputs, case)
    assert operands.mask is not None
    bits = np.asarray(hopper_matrices.mask_bits(operands.mask, operands, 64, 128))
    assert bits.shape == (2, 1, 4, 256)
    want = np.zeros((2, 1, 128, 256), bool)
    want[:, :, :77, :131] = inputs["mask"]
    query = np.arange(128) % 32
    place = 8 * (2 * (query // 8 % 2) + query % 2) + 7 - query // 2 % 4 * 2 - query // 16
    got = bits[:, :, np.arange(128) // 32].view(np.uint32) >> place[:, None] & 1
    np.testing.assert_array_equal(got.astype(bool), want)


ON_GPU = CASES | {
    "bias-long": Matrix("NTS", length=1100, key_length=1096, batch=4),
    "bias-long-causal-lengths": Matrix(
        "BTS", length=1100, key_length=1096, lengths=((1100, 1000), (777, 1096)), is_causal=True
    ),
    "mask-long": Matrix(mask="BTS", length=1100, key_length=1099, batch=4),
    "mask-long-grouped": Matrix(mask="BNTS", length=1100, key_length=1099, groups=2),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_GPU.values(), ids=list(ON_GPU))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_size", [64, 128], ids=["H64", "H128"])
def test_gradients_keep_the_tolerance_rule(head_size: int, dtype: str, case: Matrix):
    inputs = case.inputs(dtype, head_size)
    got = gradients_of(partial(sigmoid_attention, implementation="triton"), case, inputs)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        plain = gradients_of(numerics.plain, case, inputs)
        with jax.enable_x64(True):
            wide = {
                name: x if x.dtype in (np.int32, bool) else x.astype(np.float64)
                for name, x in inputs.items()
            }
            exact = gradients_of(numerics.plain, case, wide)
    names = ("query", "key", "value")  # of a bias's gradient the rule needs the magnitude too
    assert numerics.violations(got, {name: exact[name] for name in names}, plain) == []
    if case.bias is not None:
        # Sums over sequences and heads that the bias lacks, rounded like the gradients.
        error = np.abs(got["bias"].astype(np.float64) - exact["bias"]).max()
        assert error <= 2**-6 * np.abs(exact["bias"]).max() + 2**-10


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.lengths])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_size", [64, 128], ids=["H64", "H128"])
def test_padding_changes_no_bit(head_size: int, dtype: str, name: str):
    case = CASES[name]
    inputs = case.inputs(dtype, head_size)
    operands, settings = operands_of(inputs, case)
    cotangent = jnp.asarray(inputs["cotangent"])
    backward = jax.jit(launch.backward, static_argnums=1)
    want = backward(operands, settings, cotangent)
    dirty, gradient = poisoned(operands, cotangent)
    got = backward(dirty, settings, gradient)
    assert jnp.array_equal(got.key, want.key)
    assert jnp.array_equal(got.value, want.value)
    # Query gradients are added up in any order.
    np.testing.assert_allclose(
        got.query.astype(jnp.float32), want.query.astype(jnp.float32), rtol=2**-7, atol=2e-3
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_size", [64, 128], ids=["H64", "H128"])
def test_pairs_that_a_mask_excludes_have_no_part_whatever_their_logits_are(
    head_size: int, dtype: str
):
    case = Matrix(mask="BTS", biases=True)
    inputs = case.inputs(dtype, head_size)
    inputs["mask"][..., 17] = False
    clean, settings = operands_of(inputs, case)
    cotangent = jnp.asarray(inputs["cotangent"])
    assert clean.key_bias is not None
    dirty = clean._replace(key_bias=clean.key_bias.at[:, 17].set(jnp.nan))
    backward = jax.jit(launch.backward, static_argnums=1)
    want = backward(clean, settings, cotangent)
    got = backward(dirty, settings, cotangent)
    assert jnp.array_equal(got.key, want.key)
    assert jnp.array_equal(got.value, want.value)
    assert not got.key[:, 17].any()
    assert not got.value[:, 17].any()
    assert jnp.isfinite(got.query).all()


def gradients_of(op: Any, case: Matrix, inputs: dict[str, np.ndarray]) -> Any:
    """The op's gradients by argument name."""
    is_fixed = {name: x.dtype in (np.int32, bool) for name, x in inputs.items()}
    arrays = {name: jnp.asarray(x) for name, x in inputs.items() if not is_fixed[name]}
    fixed = {name: jnp.asarray(x) for name, x in inputs.items() if is_fixed[name]}
    cotangent = arrays.pop("cotangent")

    def call(arrays: dict[str, jax.Array]) -> jax.Array:
        return op(
            **arrays, **fixed, local_window_size=case.window, is_causal=case.is_causal, scale=None
        )

    gradients = jax.vjp(call, arrays)[1](cotangent)[0]
    return {name: np.asarray(x) for name, x in gradients.items()}
