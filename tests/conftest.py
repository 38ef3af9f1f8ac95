"""Set-up of every test: where jax runs, how strict it is, and what the gpu marker asks for."""

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

# Before jax is imported: without a driver, an installed CUDA plugin only fails to start.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
# For workers and what tests start, before they import NumPy: its products are small, and the
# threads of several workers, and of the emulated warpgroups, would wait for one another.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax

from tests.other_process import OtherProcess

# Arrays of unequal rank meet only where the code says so.
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_configure(config: pytest.Config) -> None:
    """What is compiled is shared by all of a session: many tests compile the same programs.

    Workers and the processes that tests start inherit the variables.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="sigjax-tests-")
    config.add_cleanup(lambda: shutil.rmtree(folder))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    # Without workers the tests run here, where jax has read the variables already.
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test that was asked for by -m gpu fails where it cannot run: a skip would pass."""
    if item.get_closest_marker("gpu") is None:
        return
    from sigjax.choice import host_refusal

    refusal = host_refusal()
    if refusal is not None:
        pytest.fail(f"marked gpu, but the Triton path cannot run here: {refusal}", pytrace=False)


@pytest.fixture(scope="module")
def code_is_not_optimised() -> Iterator[None]:
    """For tests that compare calls of the op with one another: it takes longer than to run them.

    On a GPU it is, as users have it.
    """
    on_cpu = jax.default_backend() == "cpu"
    jax.config.update("jax_disable_most_optimizations", on_cpu)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def kernels_without_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are lowered to TTGIR, and no code is made of it: most of the time goes there.

    For tests of which kernels a call has, or of their TTGIR; that they compile is told by others.
    """
    from jax_triton import triton_lib
    from triton.backends.nvidia.compiler import CUDABackend

    from sigjax.kernels import kernel_cache

    def make_llir(_: object, module: object, metadata: dict[str, object], *__: object) -> str:
        del module
        metadata |= {"shared": 0, "tmem_size": 0}
        return ""

    def make_ptx(_: object, llir: str, metadata: dict[str, object], *__: object) -> str:
        metadata["name"] = "kernel"
        return llir

    monkeypatch.setattr(CUDABackend, "make_llir", make_llir)
    monkeypatch.setattr(CUDABackend, "make_ptx", make_ptx)
    # Other tests find nothing of it, in memory or on disk.
    made: dict[object, object] = {}
    monkeypatch.setattr(triton_lib.TritonFunction, "_kernel_cache", property(lambda _: made))
    monkeypatch.setattr(kernel_cache, "folder", lambda: None)


@pytest.fixture(scope="session")
def eight_devices() -> Iterator[OtherProcess]:
    """A process with eight simulated devices, started by the first test that needs it.

    What is where and what travels is settled before any code is optimised: none is.
    """
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    devices = OtherProcess(XLA_FLAGS=flags)
    yield devices
    devices.close()


@pytest.fixture(scope="session")
def interpreter() -> Iterator[OtherProcess]:
    """A process in which Triton interprets its kernels: it decides where they are defined."""
    process = OtherProcess(TRITON_INTERPRET="1")
    yield process
    process.close()
