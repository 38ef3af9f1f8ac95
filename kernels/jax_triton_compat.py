"""What jax-triton 0.4.1 cannot do yet and the Hopper kernels need.

1. It launches the number of warps that was asked for; a warp-specialised kernel has more.
   Triton states the right number in the PTX (.reqntid).
2. It lowers Gluon through the passes of Triton's language, which serialise every wgmma.
   Gluon has passes of its own, CUDABackend.gluon_to_ttgir.

Neither changes a kernel that has no warp specialisation and is no Gluon.
tests/test_jax_triton_compat.py tells when a newer jax-triton does without.
"""

import functools
import re
from typing import Any

import jax_triton
from jax_triton import triton_lib

# The last version seen to need the fixes: a newer one is taken at its word.
NEEDED_UP_TO = (0, 4, 1)


def install() -> None:
    """Mends the jax-triton in use, once; does nothing for a newer one."""
    version = tuple(int(part) for part in re.findall(r"\d+", jax_triton.__version__)[:3])
    library = triton_lib.triton_kernel_call_lib
    if version > NEEDED_UP_TO or isinstance(library, _LaunchesCompiledWarps):
        return
    triton_lib.triton_kernel_call_lib = _LaunchesCompiledWarps(library)
    triton_lib.compile_ttir_to_ptx_inplace = _lowers_gluon(triton_lib.compile_ttir_to_ptx_inplace)


class _LaunchesCompiledWarps:
    """jaxlib's module, whose TritonKernel takes the number of warps from the PTX."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def TritonKernel(  # noqa: N802 (jaxlib's name)
        self, name: str, num_warps: int, num_ctas: int, shared: int, binary: Any, *rest: Any
    ) -> Any:
        threads = re.search(r"\.reqntid (\d+)", binary) if isinstance(binary, str) else None
        warps = int(threads[1]) // 32 if threads else num_warps
        return self._module.TritonKernel(name, warps, num_ctas, shared, binary, *rest)


def _lowers_gluon(compile_to_ptx: Any) -> Any:
    @functools.wraps(compile_to_ptx)
    def compile_either(ttir: Any, backend: Any, options: Any, capability: Any) -> Any:
        # A module of Triton's language has no number of warps before its passes ran.
        if ttir.get_int_attr("ttg.num-warps") is None:
            return compile_to_ptx(ttir, backend, options, capability)
        return compile_to_ptx(ttir, _GluonPasses(backend), options, capability)

    return compile_either


class _GluonPasses:
    """Triton's CUDA backend, with Gluon's passes in place of Triton's."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def make_ttir(self, module: Any, *_: Any) -> Any:
        return module

    def make_ttgir(self, module: Any, metadata: Any, options: Any, capability: Any) -> Any:
        return self._backend.gluon_to_ttgir(module, metadata, options, capability)
