"""Host side of the kernels: what is launched, and that all of it compiles without a GPU."""

import re
from functools import partial
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from triton.backends.nvidia.compiler import CUDABackend

import sigjax
from sigjax import numerics, vjp
from sigjax.choice import compile_for
from sigjax.kernels import hopper_choice, launch, tiles
from sigjax.numerics import Case
from sigjax.operands import Operands, Settings
from tests.in_turn import in_turn


@pytest.fixture(autouse=True)
def portable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The portable kernels serve everywhere: test_hopper_launch has the others."""
    monkeypatch.setenv(hopper_choice.VARIABLE, "")


def lower(
    function,
    *shapes: Any,
    capability: int = 90,
    platforms: tuple[str, ...] = ("cuda",),
) -> str:
    """The function's lowered text for a GPU this host does not have."""
    with compile_for(capability):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=platforms).as_text()


def shapes(
    dtype: str, head_size: int, *, kv_heads: int = 2
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    query = jax.ShapeDtypeStruct((2, 300, 2, head_size), dtype)
    return query, jax.ShapeDtypeStruct((2, 200, kv_heads, head_size), dtype)


def loss(query, key, *, implementation: Literal["triton"] | None = "triton", **options):
    output = sigjax.sigmoid_attention(query, key, key, implementation=implementation, **options)
    return output.astype(jnp.float32).sum()


# Each dtype and each head size meets both capabilities. 16 and 32 have the same tiles: bfloat16
# alone has both, one for each capability.
TILES = [
    (dtype, head_size, (80, 90)[(i + j) % 2])
    for i, dtype in enumerate(("bfloat16", "float16", "float32"))
    for j, head_size in enumerate((16, 32, 64, 128, 256))
    if (dtype, head_size) not in (("float16", 16), ("float16", 32), ("float32", 32))
]


@pytest.mark.parametrize(
    ("dtype", "head_size", "capability"), TILES, ids=[f"{d}-H{h}-sm_{c}" for d, h, c in TILES]
)
def test_every_tile_choice_compiles(dtype: str, head_size: int, capability: int):
    """Triton to PTX; XLA's ptxas sees it on a GPU host only."""
    query, key = shapes(dtype, head_size)
    text = lower(jax.value_and_grad(loss, (0, 1)), query, key, capability=capability)
    assert text.count("triton_kernel_call") == 3


VARIANTS = {
    "biases": {"sigmoid_bias": np.zeros(2, np.float32), "key_bias": np.zeros((2, 200), np.float32)},
    "causal-lengths": {
        "is_causal": True,
        "query_seq_lengths": np.array([3, 300], np.int32),
        "key_value_seq_lengths": np.array([0, 200], np.int32),
    },
}


@in_turn("options", VARIANTS, capability=(90, 80))
def test_every_variant_compiles_with_grouped_heads(options: dict, capability: int):
    query, key = shapes("bfloat16", 64, kv_heads=1)
    text = lower(jax.value_and_grad(partial(loss, **options)), query, key, capability=capability)
    assert text.count("triton_kernel_call") == 3


def pair_variant(**shapes_of: tuple[int, ...]) -> Operands:
    """Shapes of operands with arguments that concern single pairs."""
    query, key = shapes("bfloat16", 64, kv_heads=1)
    dtypes = {"bias": "bfloat16", "mask": "bool"}
    given: Any = {
        name: jax.ShapeDtypeStruct(shape, dtypes.get(name, "int32"))
        for name, shape in shapes_of.items()
    }
    return Operands(cast("Array", query), cast("Array", key), cast("Array", key), **given)


SEGMENTS = {"query_segments": (2, 300), "key_segments": (2, 200)}

# Operands, settings, and how many kernels they take forward and backward: the gradient of a bias
# with queries takes one more, and segments are looked up once for the output and twice for the
# gradients.
PAIR_VARIANTS = {
    "bias": (pair_variant(bias=(1, 2, 300, 200)), Settings(scale=1.0), 4),
    "bias-per-key": (pair_variant(bias=(1, 1, 1, 200)), Settings(scale=1.0, is_causal=True), 3),
    "bias-per-query": (pair_variant(bias=(2, 1, 300, 1)), Settings(scale=1.0), 4),
    "mask": (pair_variant(mask=(2, 1, 300, 200)), Settings(scale=1.0), 3),
    "window": (pair_variant(), Settings(scale=1.0, window=(9, 4)), 3),
    "window-causal": (pair_variant(), Settings(scale=1.0, window=(9, 4), is_causal=True), 3),
    "segments": (pair_variant(**SEGMENTS), Settings(scale=1.0), 6),
}


@in_turn("variant", PAIR_VARIANTS, capability=(80, 90))
def test_every_argument_of_pairs_compiles(variant: tuple[Operands, Settings, int], capability: int):
    operands, settings, kernels = variant

    def both(operands: Operands, gradient: Array):
        output = launch.forward(operands, settings)
        return output, launch.backward(operands, settings, gradient)

    text = lower(both, operands, operands.query, capability=capability)
    assert text.count("triton_kernel_call") == kernels


@pytest.mark.usefixtures("kernels_without_code")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_partial_sums_leave_the_kernels_in_float32_where_that_is_asked(dtype: str):
    query, key = (cast("Array", x) for x in shapes(dtype, 64))
    operands, settings = Operands(query, key, key), Settings(1.0, result_dtype=jnp.dtype("float32"))

    def both(operands: Operands, gradient: Array):
        output = launch.forward(operands, settings)
        return output, launch.backward(operands, settings, gradient)

    with compile_for(90):
        results = jax.tree.leaves(jax.eval_shape(both, operands, query))
    assert [x.dtype for x in results] == [jnp.float32] * 4
    lower(both, operands, query)


@pytest.fixture
def modules(kernels_without_code: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the TTGIR of every kernel that is lowered."""
    modules: list[str] = []
    passes = CUDABackend.make_ttgir

    def spy(*arguments):
        module = passes(*arguments)
        modules.append(str(module))
        return module

    monkeypatch.setattr(CUDABackend, "make_ttgir", staticmethod(spy))
    return modules


def test_no_running_sum_of_float32_spans_tiles_or_a_whole_head(modules: list[str]):
    """Triton folds total + dot(a, b) into one running sum; the interpreter does not show it."""
    query = jax.ShapeDtypeStruct((1, 70, 3, 256), jnp.float32)
    lower(jax.value_and_grad(loss, (0, 1)), query, query)
    dots = [line for module in modules for line in module.splitlines() if " tt.dot " in line]
    assert len(modules) == 3
    assert len(dots) > 10
    for dot in dots:
        left, right, start = re.findall(r"%\w+", dot.split(" tt.dot ")[1])[:3]
        assert start.startswith("%cst"), f"{left} · {right} is added to {start}"
        (summed,) = re.findall(r"tensor<\d+x(\d+)xf32, #ttg.dot_op<{opIdx = 0", dot)
        assert int(summed) <= 64


@pytest.mark.parametrize(
    ("given", "loads"),
    [
        ({"bias": (1, 5, 512, 512)}, 3),
        ({"mask": (2, 1, 512, 512)}, 3),
        ({"bias": (1, 5, 1, 512)}, 3),
    ],
    ids=["bias", "mask", "bias-per-key"],
)
def test_what_concerns_pairs_is_loaded_ahead_with_keys_and_values(
    given: dict[str, tuple[int, ...]], loads: int, modules: list[str]
):
    """One loop of blocks, and in it no load that waits for memory."""
    query = cast("Array", jax.ShapeDtypeStruct((2, 512, 5, 64), jnp.bfloat16))
    operands = pair_variant(**given)._replace(query=query, key=query, value=query)
    lower(partial(launch.forward, settings=Settings(scale=1.0)), operands)
    (module,) = modules
    (loop,) = module.split("scf.for")[1:]
    body, _ = loop.split("tt.num_stages", maxsplit=1)
    assert body.count("async_copy_global_to_local") == loads
    assert "tt.load" not in body


def test_the_edges_of_a_window_are_loaded_ahead_too(modules: list[str]):
    query = cast("Array", jax.ShapeDtypeStruct((2, 512, 5, 64), jnp.bfloat16))
    operands = Operands(query, query, query)
    lower(partial(launch.forward, settings=Settings(scale=1.0, window=(70, 70))), operands)
    assert len(modules) == 1
    assert modules[0].count("scf.for") == 1
    assert "tt.load" not in modules[0].split("scf.for")[1].split("tt.num_stages")[0]


@pytest.mark.parametrize(
    ("precision", "named"), [("high", "tf32x3"), ("default", "tf32")], ids=["high", "default"]
)
def test_a_precision_reaches_every_product_of_float32(
    precision: Literal["high", "default"], named: str, modules: list[str]
):
    query = jax.ShapeDtypeStruct((1, 70, 9, 32), jnp.float32)
    lower(jax.value_and_grad(partial(loss, precision=precision), (0, 1)), query, query)
    dots = [line for module in modules for line in module.splitlines() if "tt.dot " in line]
    assert len(modules) == 3
    # tf32x3 comes as its three products.
    assert len(dots) >= (8 if named == "tf32" else 24)
    assert all("inputPrecision = tf32" in dot for dot in dots)


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", [32, 128], ids=["H32", "H128"])
def test_precisions_of_float32_differ_as_their_names_say(head_size: int):
    case = Case("float32", head_size, 200, 300, 2)
    inputs = numerics.make_inputs(case)
    exact = numerics.exact(case, inputs)
    errors: dict[str, float] = {}
    for precision in ("highest", "high", "default"):
        op = partial(sigjax.sigmoid_attention, implementation="triton", precision=precision)
        got = numerics.run(op, case, inputs)
        errors[precision] = max(
            float(np.linalg.norm(got[name] - exact[name]) / np.linalg.norm(exact[name]))
            for name in ("output", "query", "key", "value")
        )
    assert errors["highest"] < 2e-6
    assert errors["high"] < 2e-5
    # TF32 keeps ten bits, the rest is cut off: two products in a row, each of two operands.
    assert 2e-5 < errors["default"] < 4 * 2**-10


def test_nothing_is_added_up_in_any_order(modules: list[str]):
    """So that gradients have the same bits in every run: no kernel has an atomic."""
    query = jax.ShapeDtypeStruct((1, 70, 7, 64), jnp.bfloat16)
    logits = jax.ShapeDtypeStruct((1, 7, 70, 1), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((7,), jnp.float32)

    def total(query, logits, bias):
        return loss(query, query, bias=logits, sigmoid_bias=bias)

    lower(jax.value_and_grad(total, (0, 1, 2)), query, logits, bias)
    assert len(modules) == 4
    assert not any("atomic" in module for module in modules)


def test_a_bias_gradient_needs_a_bias_with_queries():
    x = jnp.ones((1, 8, 1, 16), jnp.bfloat16)
    with pytest.raises(ValueError, match="operands with a bias, got None"):
        launch.bias_gradient(Operands(x, x, x), Settings(scale=1.0), x)
    operands = Operands(x, x, x, bias=jnp.ones((1, 1, 1, 8), jnp.bfloat16))
    with pytest.raises(ValueError, match=r"an axis of queries, got \(1, 1, 1, 8\)"):
        launch.bias_gradient(operands, Settings(scale=1.0), x)


@pytest.mark.usefixtures("kernels_without_code")
def test_triton_calls_one_kernel_forward_and_two_backward():
    query, key = shapes("bfloat16", 64)
    assert lower(loss, query, key).count("triton_kernel_call") == 1
    text = lower(jax.value_and_grad(loss), query, key)
    assert text.count("triton_kernel_call") == 3


@pytest.mark.usefixtures("kernels_without_code")
def test_no_implementation_means_triton_on_a_gpu_and_xla_on_a_cpu():
    query, key = shapes("bfloat16", 64)
    choose = partial(loss, implementation=None)
    gradient = jax.value_and_grad(choose)
    assert lower(gradient, query, key).count("triton_kernel_call") == 3
    assert "triton_kernel_call" not in lower(gradient, query, key, platforms=("cpu",))


@pytest.mark.usefixtures("kernels_without_code")
def test_no_weights_matrix_is_formed():
    """No array of the lowered forward and backward is as large as T x S."""
    query = jax.ShapeDtypeStruct((1, 4096, 1, 64), jnp.bfloat16)
    text = lower(jax.value_and_grad(loss), query, query)
    assert "4096x4096" not in text


def test_the_ptx_is_for_an_older_assembler_than_tritons():
    """CUDA 12.8's ptxas and newer take PTX 8.7; Triton's own choice may be newer than XLA's."""
    assert launch.PTX_VERSION == 87


def test_empty_operands_launch_nothing():
    query = jnp.ones((2, 0, 2, 64), jnp.bfloat16)
    key = jnp.ones((2, 5, 2, 64), jnp.bfloat16)
    settings = Settings(scale=1.0)
    bias = jnp.ones((2, 2))
    with compile_for(90):
        assert launch.forward(Operands(query, key, key), settings).shape == query.shape
        operands = Operands(query, key, key, sigmoid_bias=bias)
        gradients = launch.backward(operands, settings, query)
    assert not gradients.key.any()
    assert gradients.sigmoid_bias is not None
    assert not gradients.sigmoid_bias.any()


def test_launching_without_a_gpu_is_refused_with_the_reason():
    x = jnp.ones((1, 8, 1, 16), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="no NVIDIA GPU"):
        vjp.attention("triton", Settings(scale=1.0), Operands(x, x, x))


@pytest.mark.parametrize("size", [2.0**-20, 1.0, 30000.0])
def test_range_scale_brings_the_bound_of_float16_gradients_near_2_to_the_15(size: float):
    x = jnp.full((1, 4, 2, 64), size, jnp.float16)
    scale = launch.range_scale(Operands(x, x, x), x)
    assert scale is not None
    bound = np.asarray(scale, np.float64) * size * size * 64 / 4
    assert np.all(bound <= 2**15)
    assert np.all(bound > 2**13)
    assert np.all(np.frexp(scale)[0] == 0.5)


def test_range_scale_ignores_padding_and_survives_zeros():
    x = jnp.ones((2, 4, 2, 64), jnp.float16)
    lengths = jnp.array([2, 0], jnp.int32)
    poisoned = x.at[0, 2:].set(jnp.nan).at[1].set(jnp.inf)
    clean = launch.range_scale(Operands(x, x, x, key_lengths=lengths, query_lengths=lengths), x)
    operands = Operands(x, x, poisoned, key_lengths=lengths, query_lengths=lengths)
    dirty = launch.range_scale(operands, poisoned)
    assert clean is not None
    assert dirty is not None
    assert jnp.array_equal(clean, dirty)
    assert jnp.isfinite(dirty).all()


def test_only_float16_needs_a_range_scale():
    x = jnp.ones((1, 4, 2, 64), jnp.bfloat16)
    assert launch.range_scale(Operands(x, x, x), x) is None


def test_tiles_do_not_look_at_batch_or_length():
    parameters = set(tiles.choose_tile.__annotations__) - {"return"}
    assert parameters == {"kernel", "head_size", "itemsize", "capability", "pairs"}


@pytest.mark.parametrize(
    ("given", "shared"),
    [
        ({}, (False, False)),
        ({"bias": (1, 2, 300, 200)}, (True, False)),
        ({"mask": (2, 1, 300, 200)}, (False, True)),
        ({"bias": (2, 2, 300, 200), "mask": (1, 1, 300, 200)}, (True, True)),
        ({"bias": (1, 1, 1, 200), "mask": (1, 1, 300, 1)}, (False, False)),
    ],
)
def test_programs_that_share_tiles_of_a_bias_or_mask_are_neighbours(
    given: dict[str, tuple[int, ...]], shared: tuple[bool, bool]
):
    assert launch._shared(pair_variant(**given)) == shared
