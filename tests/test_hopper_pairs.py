"""Window and segments in the Hopper forward kernel: hopper_pairs.py.

Which keys are visited, in Triton's interpreter; the numbers, on a GPU.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sigjax
from benchmarks.first_launch import violations
from sigjax import numerics
from sigjax.kernels import hopper_choice, launch
from sigjax.numerics import Case
from sigjax.operands import Operands, Settings
from tests.interpreted_kernels import packed
from tests.other_process import OtherProcess

windows = st.one_of(
    st.none(),
    st.tuples(st.integers(0, 70), st.integers(0, 70)),
    st.tuples(st.just(10**9), st.integers(0, 20)),
    st.tuples(st.integers(0, 20), st.just(10**9)),
)
sizes = st.integers(1, 120)


@st.composite
def ids(draw: st.DrawFn) -> list[int]:
    """Segments one after the other, with padding in between or not, or in any order."""
    parts = draw(st.lists(st.tuples(st.integers(-1, 4), st.integers(1, 50)), min_size=1))
    if draw(st.booleans()):
        parts = [(index, length) for index, (_, length) in enumerate(parts, 1)]
    return [part for part, length in parts for _ in range(length)][:120]


@st.composite
def calls(draw: st.DrawFn, *, packed: bool) -> dict[str, Any]:
    side = ids() if packed else sizes
    fields: dict[str, Any] = {"query_segments": draw(side), "key_segments": draw(side)}
    # Without segments the kernel asks for ranges where there is a window alone.
    fields["window"] = draw(windows if packed else windows.filter(lambda x: x is not None))
    fields["is_causal"] = draw(st.booleans())
    fields["query_length"] = fields["key_length"] = None
    if draw(st.booleans()):
        fields |= {"query_length": draw(st.integers(0, 120)), "key_length": draw(sizes)}
        for name in ("query", "key"):
            full = fields[f"{name}_segments"]
            full = full if isinstance(full, int) else len(full)
            fields[f"{name}_length"] = min(fields[f"{name}_length"], full)
    return fields


@settings(deadline=None, max_examples=15)
@given(call=calls(packed=False))
def test_a_window_visits_the_blocks_it_meets(call: dict[str, Any], interpreter: OtherProcess):
    assert interpreter.check("tests.interpreted_kernels", "check_spans", call) is None


@settings(deadline=None, max_examples=15)
@given(call=calls(packed=True))
def test_segments_visit_the_blocks_they_meet(call: dict[str, Any], interpreter: OtherProcess):
    assert interpreter.check("tests.interpreted_kernels", "check_spans", call) is None


@pytest.mark.parametrize(
    "call",
    [
        # Windows that end before, or lie behind, all keys; and rows that are padding alone.
        {"query_segments": 120, "key_segments": 5, "window": (3, 2)},
        {"query_segments": 100, "key_segments": 100, "window": (0, 0)},
        {"query_segments": [0] * 90, "key_segments": [1] * 90, "window": None},
        {"query_segments": [1] * 60 + [2] * 60, "key_segments": [2] * 60 + [1] * 60,
         "window": (9, 9)},
    ],
    ids=["behind-the-keys", "of-one", "padding", "elsewhere"],
)  # fmt: skip
def test_tiles_without_keys_visit_nothing(call: dict[str, Any], interpreter: OtherProcess):
    fields = {"is_causal": False, "query_length": None, "key_length": None} | call
    assert interpreter.check("tests.interpreted_kernels", "check_spans", fields) is None


# Several tiles a program, of 192 and of 128 rows, and several key blocks of 128.
LENGTH, HEADS, KV_HEADS = 1100, 16, 2
RAGGED = {
    "query_seq_lengths": np.array([1033, 517], np.int32),
    "key_value_seq_lengths": np.array([700, 1100], np.int32),
}
head_sizes = pytest.mark.parametrize("head_size", [64, 128], ids=["H64", "H128"])
dtypes = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
on_hopper = pytest.mark.usefixtures("hopper")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hopper kernels serve what they can, even where they are slower."""
    monkeypatch.setenv(hopper_choice.VARIABLE, "forward,backward,narrow")


def arrays(head_size: int, dtype: str, key_length: int = LENGTH) -> numerics.Named:
    """Query, key and value of two rows."""
    rng = np.random.default_rng(0)
    shapes = dict.fromkeys(("key", "value"), (2, key_length, KV_HEADS, head_size))
    shapes["query"] = (2, LENGTH, HEADS, head_size)
    return {
        name: rng.standard_normal(shape).astype(jnp.dtype(dtype)) for name, shape in shapes.items()
    }


def packed_rows() -> numerics.Named:
    """Unequal segments with padding in between; and segments in another order on each side."""
    lengths = (1, 63, 64, 65, 130, 257, 7, 400)
    own, other = (packed(x, LENGTH, gap=9) for x in (lengths, (30, *lengths[2:], 12)))
    turned = np.random.default_rng(1).permutation(np.repeat(np.arange(-1, 10), 100))
    ids = np.stack([own, own[::-1]]), np.stack([other, turned])
    names = ("query_segment_ids", "key_value_segment_ids")
    return {name: x.astype(np.int32) for name, x in zip(names, ids, strict=True)}


def output(inputs: dict[str, Any], **options: Any) -> np.ndarray:
    """What the kernel gives."""
    op = partial(sigjax.sigmoid_attention, implementation="triton", **options)
    return np.asarray(jax.jit(lambda inputs: op(**inputs))(inputs))


def wrong(inputs: dict[str, Any], **options: Any) -> list[str]:
    """What the output breaks of the tolerance rule."""
    wide: dict[str, Any] = {
        name: x if np.issubdtype(x.dtype, np.integer) else x.astype(np.float64)
        for name, x in inputs.items()
    }
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        plain = np.asarray(numerics.plain(**inputs, **options))
        with jax.enable_x64(True):
            exact = np.asarray(numerics.plain(**wide, **options))
    got = output(inputs, **options)
    return numerics.violations({"output": got}, {"output": exact}, {"output": plain})


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("groups", "lengths"),
    [(1, None), (2, ((333, 400), (1, 0), (129, 131), (0, 9)))],
    ids=["full", "grouped-ragged"],
)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("extra", ["window", "segments"])
@dtypes
@head_sizes
def test_cases_keep_the_tolerance_rule(
    head_size: int, dtype: str, extra: str, is_causal: bool, groups: int, lengths: Any
):
    case = Case(dtype, head_size, 333, 400, groups, is_causal, lengths=lengths, extra=extra)
    assert violations(case, "triton") == []
    biases = replace(case, biases=True)
    assert extra == "segments" or violations(biases, "triton") == []


WINDOWS = [(0, 0), (3, 3), (300, 0), (0, 5), (10**9, 60), (60, 10**9), (2000, 2000), (256, 256)]


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "causal-ragged-float16"])
@pytest.mark.parametrize("window", WINDOWS, ids=lambda x: f"{min(x[0], 9999)}-{min(x[1], 9999)}")
@head_sizes
def test_windows_of_long_rows(head_size: int, window: tuple[int, int], ragged: bool):
    inputs = arrays(head_size, "float16" if ragged else "bfloat16") | (RAGGED if ragged else {})
    assert wrong(inputs, local_window_size=window, is_causal=ragged) == []


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("window", [(5, 5), (10**9, 0), (200, 200)], ids=["5", "left", "200"])
@head_sizes
def test_most_queries_lie_behind_all_keys(head_size: int, window: tuple[int, int]):
    inputs = arrays(head_size, "bfloat16", key_length=70)
    assert wrong(inputs, local_window_size=window) == []
    if window[0] < LENGTH:
        assert not output(inputs, local_window_size=window)[:, 70 + window[0] :].any()


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "ragged": RAGGED,
    "window": {"local_window_size": (70, 20)},
    "window-of-one": {"local_window_size": (0, 0)},
    "all": {"local_window_size": (200, 90), "is_causal": True, "sigmoid_bias": -4.0, **RAGGED},
}


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@dtypes
@head_sizes
def test_segments_of_long_rows(head_size: int, dtype: str, options: dict[str, Any]):
    inputs: dict[str, Any] = arrays(head_size, dtype) | packed_rows()
    options = dict(options)
    inputs |= {name: options.pop(name) for name in RAGGED if name in options}
    assert wrong(inputs, **options) == []


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("options", ["plain", "ragged", "all"])
@pytest.mark.parametrize("poison", [np.nan, np.inf], ids=["nan", "inf"])
@dtypes
@head_sizes
def test_padding_between_segments_changes_no_bit(
    head_size: int, dtype: str, poison: float, options: str
):
    ids = packed_rows()
    given = dict(OPTIONS[options])
    ids |= {name: given.pop(name) for name in RAGGED if name in given}
    clean = arrays(head_size, dtype)
    dirty = {name: x.copy() for name, x in clean.items()}
    dirty["query"][ids["query_segment_ids"] <= 0] = poison
    for name in ("key", "value"):
        dirty[name][ids["key_value_segment_ids"] <= 0] = poison
    got, want = (output(inputs | ids, **given) for inputs in (dirty, clean))
    np.testing.assert_array_equal(got, want)
    assert not got[ids["query_segment_ids"] <= 0].any()


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("fast_sigmoid", [False, True], ids=["exact", "fast"])
@dtypes
@head_sizes
def test_what_lies_beside_a_segment_changes_no_bit(head_size: int, dtype: str, fast_sigmoid: bool):
    ids = packed_rows()
    clean = arrays(head_size, dtype)
    for segment in (2, 6):
        others = {name: x.copy() for name, x in clean.items()}
        # Logits large enough that another way to compute weights would be taken.
        others["query"][ids["query_segment_ids"] != segment] *= 8
        for name in ("key", "value"):
            others[name][ids["key_value_segment_ids"] != segment] *= -8
        own = ids["query_segment_ids"] == segment
        got, want = (
            output(inputs | ids, fast_sigmoid=fast_sigmoid)[own] for inputs in (others, clean)
        )
        np.testing.assert_array_equal(got, want)


@on_hopper
@pytest.mark.gpu
@dtypes
@head_sizes
def test_partial_sums_round_to_the_output(head_size: int, dtype: str):
    query, key, value = (arrays(head_size, dtype)[x] for x in ("query", "key", "value"))
    segments = [jnp.asarray(x) for x in packed_rows().values()]
    operands = Operands(
        *map(jnp.asarray, (query, key, value)), query_segments=segments[0], key_segments=segments[1]
    )
    narrow = Settings(scale=head_size**-0.5, window=(300, 300))
    wide = replace(narrow, result_dtype=np.dtype("float32"))
    rounded = launch.forward(operands, wide).astype(dtype)
    assert jnp.array_equal(rounded, launch.forward(operands, narrow))
