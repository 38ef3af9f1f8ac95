"""The two fixes that jax-triton 0.4.1 needs, each with a test that tells when it no longer does."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax_triton
import pytest
from jax_triton import triton_lib
from triton.backends.nvidia.compiler import CUDABackend
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sigjax.kernels import jax_triton_compat

PATCHED = ("triton_kernel_call_lib", "compile_ttir_to_ptx_inplace")


# jax-triton keeps what it compiled: each lowering is of a kernel with another constant.
constants = itertools.count()


@gluon.jit
def store(ptr, CONSTANT: gl.constexpr, LAYOUT: gl.constexpr):
    offsets = gl.arange(0, 128, layout=LAYOUT)
    gl.store(ptr + offsets, gl.full([128], CONSTANT, gl.int32, LAYOUT))


@gluon.jit
def kernel_with_worker(out_ptr, CONSTANT: gl.constexpr, LAYOUT: gl.constexpr):
    """A default partition of 4 warps beside a worker of 4: 8 warps to launch."""
    gl.warp_specialize(
        [(store, (out_ptr, CONSTANT, LAYOUT)), (store, (out_ptr + 128, CONSTANT, LAYOUT))],
        [4],
        [24],
    )


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """jax-triton as it comes; what a test mends is undone."""
    # Passes are seen where they run: nothing is found among what was compiled before.
    for name in (*PATCHED, "compile_ttir_inplace"):
        patched = getattr(triton_lib, name)
        original = getattr(patched, "_module", getattr(patched, "__wrapped__", patched))
        monkeypatch.setattr(triton_lib, name, original)
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where it is unset
    return monkeypatch


def launched_warps(monkeypatch: pytest.MonkeyPatch) -> int:
    """Lowers the kernel for sm_90 and tells how many warps jaxlib was asked to launch."""
    library = triton_lib.triton_kernel_call_lib
    # The compatibility layer wraps jaxlib's module; the spy stands in its place.
    module = getattr(library, "_module", library)
    warps = []

    class Spy:
        def __getattr__(self, attribute):
            return getattr(module, attribute)

        def TritonKernel(self, kernel, num_warps, *rest):  # noqa: N802 (jaxlib's name)
            warps.append(num_warps)
            return module.TritonKernel(kernel, num_warps, *rest)

    if library is module:
        monkeypatch.setattr(triton_lib, "triton_kernel_call_lib", Spy())
    else:
        monkeypatch.setattr(library, "_module", Spy())

    def call():
        return jax_triton.triton_call(
            kernel=kernel_with_worker,
            out_type=jax.ShapeDtypeStruct((256,), jnp.int32),
            grid=(1,),
            num_warps=4,
            compute_capability=90,
            CONSTANT=next(constants),
            LAYOUT=gl.BlockedLayout([1], [32], [4], [0]),
            backend_options={"ptx_version": 87},
        )

    jax.jit(call).trace().lower(lowering_platforms=("cuda",))
    (result,) = warps
    return result


def test_jax_triton_alone_launches_too_few_warps(fresh: pytest.MonkeyPatch):
    """When this fails upstream has mended it: drop the fix for that version."""
    assert launched_warps(fresh) == 4


def test_mended_it_launches_the_warps_of_the_compiled_kernel(fresh: pytest.MonkeyPatch):
    jax_triton_compat.install()
    assert launched_warps(fresh) == 8


def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the backend's pass pipelines a Gluon module goes through."""
    taken = []
    for name in ("make_ttgir", "gluon_to_ttgir"):
        original = getattr(CUDABackend, name)

        def spy(*arguments, _name=name, _original=original):
            taken.append(_name)
            return _original(*arguments)

        monkeypatch.setattr(CUDABackend, name, _as_declared(CUDABackend, name, spy))
    launched_warps(monkeypatch)
    return taken


def _as_declared(owner: type, name: str, function: Callable) -> Callable | staticmethod:
    """A stand-in for a method, static where the method is."""
    return staticmethod(function) if isinstance(vars(owner)[name], staticmethod) else function


def test_jax_triton_alone_takes_the_passes_of_tritons_language(fresh: pytest.MonkeyPatch):
    """When this fails upstream has mended it."""
    assert passes(fresh) == ["make_ttgir"]


def test_mended_it_takes_gluons_passes(fresh: pytest.MonkeyPatch):
    jax_triton_compat.install()
    assert passes(fresh) == ["gluon_to_ttgir"]


def test_a_newer_jax_triton_is_left_alone(fresh: pytest.MonkeyPatch):
    fresh.setattr(jax_triton, "__version__", "0.5.0")
    before = [getattr(triton_lib, name) for name in PATCHED]
    jax_triton_compat.install()
    assert [getattr(triton_lib, name) for name in PATCHED] == before


def test_installing_twice_mends_once(fresh: pytest.MonkeyPatch):
    jax_triton_compat.install()
    once = [getattr(triton_lib, name) for name in PATCHED]
    jax_triton_compat.install()
    assert [getattr(triton_lib, name) for name in PATCHED] == once
