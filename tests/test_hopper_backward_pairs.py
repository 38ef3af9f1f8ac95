"""Windows and packed segments in the Hopper backward kernel: hopper_backward_pairs.py."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.first_launch import violations
from sigjax import numerics, reference
from sigjax.attention import sigmoid_attention
from sigjax.checks import check
from sigjax.choice import compile_for
from sigjax.kernels import hopper_choice, launch
from sigjax.numerics import Case, make_inputs
from sigjax.operands import Operands, Settings
from tests import definition, emulated_hopper
from tests.in_turn import HEAD_SIZES, in_turn
from tests.interpreted_kernels import packed

BATCH, LENGTH, KEYS, HEADS = 2, 300, 200, 2
BACKWARD = "hopper_backward_kernel"


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both Hopper kernels serve what they can, as by default."""
    monkeypatch.delenv(hopper_choice.VARIABLE, raising=False)


PAIR_VARIANTS: dict[str, dict[str, Any]] = {
    "window": {"window": (40, 25)},
    "window-causal": {"window": (40, 25), "is_causal": True},
    "window-left": {"window": (40, 2**40), "lengths": True},
    "window-grouped-lengths": {"window": (40, 25), "lengths": True, "kv_heads": 1},
    "window-biases": {"window": (40, 25), "biases": True},
    "segments": {"segments": True},
    "segments-lengths": {"segments": True, "lengths": True},
    "segments-causal-grouped": {"segments": True, "is_causal": True, "kv_heads": 1},
    "segments-window-lengths": {"segments": True, "window": (40, 25), "lengths": True},
    "segments-biases": {"segments": True, "biases": True},
}


def backward_kernels(
    dtype: str,
    head_size: int,
    monkeypatch: pytest.MonkeyPatch,
    *,
    kv_heads: int = HEADS,
    lengths: bool = False,
    biases: bool = False,
    segments: bool = False,
    window: tuple[int, int] | None = None,
    is_causal: bool = False,
    deterministic: bool = False,
) -> list[str]:
    """Compiles a backward pass for sm_90 and tells which kernels it calls."""

    def shape(*sizes: int, dtype: str = dtype) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype)

    query = shape(BATCH, LENGTH, HEADS, head_size)
    key = shape(BATCH, KEYS, kv_heads, head_size)
    given: dict[str, Any] = {}
    if lengths:
        given |= dict.fromkeys(("query_lengths", "key_lengths"), shape(BATCH, dtype="int32"))
    if biases:
        given |= {
            "sigmoid_bias": shape(BATCH, HEADS, dtype="float32"),
            "key_bias": shape(BATCH, KEYS, dtype="float32"),
        }
    if segments:
        given |= {
            "query_segments": shape(BATCH, LENGTH, dtype="int32"),
            "key_segments": shape(BATCH, KEYS, dtype="int32"),
        }
    settings = Settings(
        scale=0.125, is_causal=is_causal, window=window, deterministic=deterministic
    )
    names: list[str] = []
    call = launch.call

    def spy(kernel, *arguments, **options):
        names.append(kernel.__name__)
        return call(kernel, *arguments, **options)

    monkeypatch.setattr(launch, "call", spy)

    def gradients(operands: Operands, gradient: jax.Array):
        return launch.backward(operands, settings, gradient)

    with compile_for(90):
        traced = jax.jit(gradients).trace(Operands(query, key, key, **given), query)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("triton_kernel_call") == len(names)
    return sorted(name for name in names if name != "query_sums_kernel")


# Those with nothing besides are compiled with less than all others are.
@in_turn(
    "options",
    {name: x for name, x in PAIR_VARIANTS.items() if name not in ("window", "segments")},
    head_size=HEAD_SIZES,
    dtype=("bfloat16", "bfloat16", "float16", "float16"),
)
def test_windows_and_segments_compile_and_are_served_backward(
    head_size: int, dtype: str, options: dict, monkeypatch: pytest.MonkeyPatch
):
    # Segments take the queries of each program and, without sigmoid_bias, the rows' bias.
    looked_up = 2 - ("biases" in options) if "segments" in options else 0
    expected = [BACKWARD] + ["segment_kernel"] * looked_up
    assert backward_kernels(dtype, head_size, monkeypatch, **options) == expected


@pytest.mark.usefixtures("kernels_without_code")
@pytest.mark.parametrize(
    "options",
    [{"deterministic": True}, {"biases": True, "kv_heads": 1}],
    ids=["deterministic", "grouped-biases"],
)
@pytest.mark.parametrize("pairs", [{"window": (9, 4)}, {"segments": True}], ids=["window", "seg"])
def test_what_is_refused_is_refused_with_windows_and_segments_too(
    pairs: dict, options: dict, monkeypatch: pytest.MonkeyPatch
):
    names = backward_kernels("bfloat16", 64, monkeypatch, **pairs, **options)
    assert BACKWARD not in names
    assert "key_value_gradient_kernel" in names


@dataclass(frozen=True)
class Packed:
    """A call with a window or segments, two sequences of 2 key heads.

    Attributes:
        length: T.
        key_length: S; None is T.
        window: (left, right).
        segments: lengths of the packed sequences of queries, with a gap of padding before each.
        key_segments: those of keys; None is segments.
        gap: rows of padding.
        reverse: whether the second sequence is packed in falling order.
        lengths: query lengths, and key lengths; None where all rows are full.
        groups: query heads a key head serves.
        is_causal: as in the op.
        biases: whether sigmoid_bias and key_bias are given.
    """

    length: int = 300
    key_length: int | None = None
    window: tuple[int, int] | None = None
    segments: tuple[int, ...] | None = None
    key_segments: tuple[int, ...] | None = None
    gap: int = 0
    reverse: bool = False
    lengths: tuple[tuple[int, int], tuple[int, int]] | None = None
    groups: int = 1
    is_causal: bool = False
    biases: bool = False

    def inputs(self, dtype: str, head_size: int) -> dict[str, np.ndarray]:
        """The op's arrays and the output's cotangent, by name."""
        keys = self.length if self.key_length is None else self.key_length
        case = Case(dtype, head_size, self.length, keys, self.groups, biases=self.biases)
        inputs = make_inputs(case)
        if self.lengths is not None:
            for name, lengths in zip(("query", "key_value"), self.lengths, strict=True):
                inputs[f"{name}_seq_lengths"] = np.array(lengths, np.int32)
        if self.segments is not None:
            sides = {"query": (self.segments, self.length)}
            sides["key_value"] = (self.key_segments or self.segments, keys)
            for name, (segments, size) in sides.items():
                ids = packed(segments, size, self.gap)
                inputs[f"{name}_segment_ids"] = np.stack([ids, ids[::-1] if self.reverse else ids])
        return inputs


LONG = (333, 1, 64, 150, 65, 201)
PACKED = {
    "window-of-one": Packed(window=(0, 0)),
    "window-smaller-than-a-block": Packed(window=(7, 3), groups=2),
    "window-of-a-block": Packed(window=(62, 62), key_length=200),
    "window-of-a-block-and-one": Packed(window=(63, 63), length=200, key_length=300),
    # Just one query of its first, and of its last, block meets a program's keys.
    "window-one-row-of-a-block": Packed(window=(65, 65), length=400),
    "window-before": Packed(window=(126, 0)),
    "window-behind": Packed(window=(0, 127)),
    "window-left": Packed(window=(62, 2**30), length=400),
    "window-right": Packed(window=(2**30, 62)),
    "window-causal": Packed(window=(100, 9), is_causal=True, groups=2),
    "window-lengths": Packed(window=(40, 25), lengths=((300, 77), (201, 300))),
    "window-biases": Packed(window=(40, 25), biases=True, lengths=((300, 77), (201, 300))),
    "keys-no-query-sees": Packed(window=(50, 50), length=100, key_length=400),
    "causal-keys-no-query-sees": Packed(length=100, key_length=400, is_causal=True),
    "segments": Packed(segments=(100, 128, 72)),
    "segments-of-blocks": Packed(segments=(128, 64, 64, 44), reverse=True),
    # The queries of the keys from 128 on: blocks at both ends lack one.
    "segment-one-row-short": Packed(segments=(65, 126, 109), key_segments=(128, 128, 44)),
    "segment-of-all": Packed(segments=(300,), groups=2),
    "segments-unequal": Packed(segments=(10, 200, 60), key_segments=(150, 3, 100), reverse=True),
    "segments-with-gaps": Packed(segments=(60, 130, 29), gap=21, reverse=True, groups=2),
    "segments-lengths": Packed(segments=(99, 120, 81), lengths=((250, 0), (300, 130))),
    "segments-causal": Packed(segments=(70, 140, 60), is_causal=True),
    "segments-window": Packed(segments=(170, 100), window=(62, 5), gap=9),
    "segments-biases": Packed(segments=(60, 130, 29), gap=21, biases=True),
    "segments-window-causal": Packed(
        segments=(170, 100), window=(30, 5), is_causal=True, lengths=((290, 171), (300, 203))
    ),
    "segments-without-keys": Packed(segments=(20, 80, 90, 100), key_segments=(300,)),
    "padding-alone": Packed(segments=(0,)),
}


def operands_of(inputs: dict[str, np.ndarray], case: Packed) -> tuple[Operands, Settings]:
    """The op's arguments as its checks hand them on, in float32."""
    given: dict[str, Any] = dict.fromkeys(("bias", "mask", "sigmoid_bias", "key_bias"))
    given |= dict.fromkeys(("query_seq_lengths", "key_value_seq_lengths", "scale"))
    given |= inputs | {"is_causal": case.is_causal, "local_window_size": case.window}
    del given["cotangent"]
    return check(**given)


@in_turn("case", PACKED, head_size=HEAD_SIZES)
def test_emulated_gradients_are_those_of_the_definition_whatever_padding_holds(
    head_size: int, case: Packed
):
    inputs = case.inputs("float32", head_size)
    operands, settings = operands_of(inputs, case)
    cotangent = jnp.asarray(inputs["cotangent"])
    names = ["query", "key", "value", *["sigmoid_bias", "key_bias"] * case.biases]

    want = definition.gradients(operands, settings, cotangent, names)
    got, copies = emulated_hopper.backward(operands, settings, cotangent)
    for name in names:
        # Float32 sums in another order.
        largest = float(jnp.abs(want[name]).max())
        np.testing.assert_allclose(
            getattr(got, name), want[name], rtol=0, atol=2e-5 * max(1, largest), err_msg=name
        )
    assert copies == visited_blocks(operands, settings, ahead=head_size == 64)
    rows = reference.valid_queries(operands)[:, :, None, None]
    columns = reference.valid_keys(operands)[:, :, None, None]
    dirty = operands._replace(
        query=jnp.where(rows, operands.query, jnp.nan),
        key=jnp.where(columns, operands.key, jnp.inf),
        value=jnp.where(columns, operands.value, jnp.nan),
    )
    if operands.key_bias is not None:
        dirty = dirty._replace(key_bias=jnp.where(columns[..., 0, 0], operands.key_bias, jnp.nan))
    poisoned, _ = emulated_hopper.backward(dirty, settings, jnp.where(rows, cotangent, -jnp.inf))
    for name in names:
        assert jnp.array_equal(getattr(poisoned, name), getattr(got, name)), name
    assert not jnp.where(rows, 0, got.query).any()
    assert not jnp.where(columns, 0, got.key).any()
    assert not jnp.where(columns, 0, got.value).any()


def visited_blocks(operands: Operands, settings: Settings, *, ahead: bool) -> int:
    """Blocks of queries from the first to the last that meets a program's keys, over all heads.

    With ahead a program with work has one more, of a step that does not come. Of keys past the
    length a window counts as if they were there.
    """
    batch, length, heads, _ = operands.query.shape
    kv_heads = operands.key.shape[2]
    keys = operands.key.shape[1]
    full = operands._replace(key_lengths=None)
    allowed = np.broadcast_to(reference.pairs(full, settings)[:, 0], (batch, length, keys))
    if operands.query_segments is not None:
        allowed = np.broadcast_to(reference.pairs(operands, settings)[:, 0], allowed.shape)
    key_lengths = np.full(batch, keys) if operands.key_lengths is None else operands.key_lengths
    blocks = 0
    for pairs, key_length in zip(allowed, key_lengths, strict=True):
        for first in range(0, int(key_length), 128):
            (met,) = np.nonzero(pairs[:, first : first + 128].any(1))
            if met.size:
                steps = int(met[-1]) // 64 - int(met[0]) // 64 + 1
                blocks += steps * heads + ahead * kv_heads
    return blocks


@pytest.mark.gpu
@pytest.mark.parametrize(
    "lengths", [None, ((333, 200), (1, 0), (129, 131), (0, 64))], ids=["full", "ragged"]
)
@pytest.mark.parametrize(("is_causal", "groups"), [(False, 1), (True, 1), (True, 2)])
@pytest.mark.parametrize("extra", ["window", "segments"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_size", [64, 128], ids=["H64", "H128"])
def test_windows_and_segments_keep_the_tolerance_rule(
    head_size: int, dtype: str, extra: str, is_causal: bool, groups: int, lengths: Any
):
    case = Case(dtype, head_size, 333, 200, groups, is_causal, lengths=lengths, extra=extra)
    assert violations(case, "triton") == []


LONG_ROWS = {
    "window": Packed(1100, window=(300, 200)),
    "window-causal": Packed(1100, window=(129, 0), is_causal=True, groups=2),
    "segments": Packed(1100, segments=LONG, gap=31, reverse=True),
    "segments-causal-grouped": Packed(1100, segments=LONG, gap=31, is_causal=True, groups=2),
    "segments-window": Packed(1100, segments=LONG, gap=31, window=(70, 130)),
    "segments-lengths": Packed(1100, segments=LONG, gap=40, lengths=((1100, 700), (650, 1099))),
    "segments-without-gaps": Packed(1100, segments=(500, 12, 588)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", (PACKED | LONG_ROWS).values(), ids=list(PACKED | LONG_ROWS))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_size", [64, 128], ids=["H64", "H128"])
def test_gradients_of_packed_rows_and_windows_keep_the_tolerance_rule(
    head_size: int, dtype: str, case: Packed
):
    inputs = case.inputs(dtype, head_size)
    dirty = {name: x.copy() for name, x in inputs.items()}
    if case.segments is not None:
        for name in ("query", "cotangent", "key", "value"):
            side = "query" if name in ("query", "cotangent") else "key_value"
            dirty[name][inputs[f"{side}_segment_ids"] <= 0] = np.nan
    got = gradients_of(partial(sigmoid_attention, implementation="triton"), case, dirty)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        plain = gradients_of(numerics.plain, case, inputs)
        with jax.enable_x64(True):
            wide = {
                name: x if x.dtype == np.int32 else x.astype(np.float64)
                for name, x in inputs.items()
            }
            exact = gradients_of(numerics.plain, case, wide)
    names = ("query", "key", "value")  # of a bias's gradient the rule needs the magnitude too
    assert numerics.violations(got, {name: exact[name] for name in names}, plain) == []


def gradients_of(op: Callable[..., jax.Array], case: Packed, inputs: dict[str, np.ndarray]) -> Any:
    """The op's gradients by argument name."""
    arrays = {name: jnp.asarray(x) for name, x in inputs.items() if x.dtype != np.int32}
    fixed = {name: jnp.asarray(x) for name, x in inputs.items() if x.dtype == np.int32}
    cotangent = arrays.pop("cotangent")

    def call(arrays: dict[str, jax.Array]) -> jax.Array:
        return op(
            **arrays, **fixed, local_window_size=case.window, is_causal=case.is_causal, scale=None
        )

    gradients = jax.vjp(call, arrays)[1](cotangent)[0]
    return {name: np.asarray(x) for name, x in gradients.items()}
