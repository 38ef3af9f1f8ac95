"""Compiled kernels on disk, beside JAX's compilation cache: jax-triton keeps them a process long.

A Hopper kernel takes two or three seconds; every process that trains or tests needs the same ones.
"""

import dataclasses
import functools
import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax
import jax_triton
import triton
from jax_triton import triton_lib

FOLDER = "sigjax_kernels"  # within jax_compilation_cache_dir
# What of a result only a dump shows.
_NOT_KEPT = {"ttgir": "", "llir": ""}


def install() -> None:
    """Lets jax-triton look for a kernel before it compiles one, once.

    Where jax.config.jax_compilation_cache_dir (JAX_COMPILATION_CACHE_DIR) names a folder, when a
    kernel is compiled; elsewhere nothing is read or written.
    """
    compile_module = triton_lib.compile_ttir_inplace
    if not hasattr(compile_module, "__wrapped__"):
        triton_lib.compile_ttir_inplace = _kept(compile_module)


def folder() -> Path | None:
    """Where kernels are kept; None without a compilation cache, or with one that is no folder."""
    name = jax.config.jax_compilation_cache_dir
    if not jax.config.jax_enable_compilation_cache or not name or "://" in name:
        return None
    return Path(name) / FOLDER


def _kept(compile_module: Any) -> Any:
    @functools.wraps(compile_module)
    def compile_once(ttir: Any, backend: Any, options: Any, target: Any) -> Any:
        kernels = folder()
        if kernels is None:
            return compile_module(ttir, backend, options, target)
        # All that the result depends on: what Python made of the kernel, before any pass.
        versions = (triton.__version__, jax_triton.__version__)
        text = "\n".join(map(str, (versions, options, target, ttir)))
        path = kernels / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
        found = _read(path)
        if found is None:
            found = compile_module(ttir, backend, options, target)
            try:
                _write(path, dataclasses.replace(found, **_NOT_KEPT))
            except OSError as error:  # read-only or full: as JAX's own cache, it only warns
                warnings.warn(f"a compiled kernel is not kept: {error}", stacklevel=2)
        return found

    return compile_once


def _read(path: Path) -> Any:
    """A result; None where there is none, or none that is whole."""
    try:
        return triton_lib.CompilationResult(**json.loads(path.read_text()))
    except OSError:  # not there; a folder that cannot be used is told of where it is written to
        return None
    except (ValueError, TypeError):  # cut short, or of other fields: it is written again
        return None


def _write(path: Path, result: Any) -> None:
    """Writes a result in one step: other processes read and write the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "w") as file:
        json.dump(dataclasses.asdict(result), file)
    Path(name).replace(path)
