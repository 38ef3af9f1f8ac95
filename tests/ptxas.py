"""A kernel as PTX, and what ptxas says of it, without a GPU."""

import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from jax_triton import triton_lib
from triton import knobs

from sigjax.choice import compile_for


def ptx_of(kernel: Any, function: Callable[..., Any], *arguments: Any) -> str:
    """The PTX of a kernel that a function of these shapes launches once."""
    texts: list[str] = []
    library = triton_lib.triton_kernel_call_lib
    create = library.TritonKernel

    def spy(*given: Any) -> Any:
        texts.extend(x for x in given if isinstance(x, str) and ".version" in x)
        return create(*given)

    # What was compiled before is not compiled again.
    kept = vars(kernel).pop("_jT_kernel_cache", None)
    with mock.patch.object(library, "TritonKernel", spy), compile_for(90):
        jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    if kept is not None:
        kernel._jT_kernel_cache = kept
    (text,) = [x for x in texts if f".entry {kernel.__name__}(" in x]
    return text


def said_of(ptx: str) -> str:
    """The messages of ptxas."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [knobs.nvidia.ptxas.path, "-arch=sm_90a", "-v", source, "-o", f"{source}.cubin"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def assert_no_spill(ptx: str) -> None:
    """That no register is kept in memory, and no product waits for another."""
    said = said_of(ptx)
    assert "0 bytes spill stores, 0 bytes spill loads" in said
    assert "Performance Loss" not in said
