"""A kernel is compiled once a folder, is read whole or not at all, and kept where programs are."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax_triton import triton_lib

from sigjax.kernels import kernel_cache

RESULT = triton_lib.CompilationResult("ptx", "kernel", 1024, "ttgir", "llir")


class Compiler:
    """Stands in for jax-triton's: a module is its text. times counts what was not found."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, ttir: str, backend: None, options: str, target: str) -> Any:
        """A result that is always the same."""
        self.times += 1
        return RESULT

    def run(self, ttir: str = "module", options: str = "", target: str = "sm_90") -> Any:
        """Compiles, or finds, a module."""
        compile_module: Any = triton_lib.compile_ttir_inplace
        return compile_module(ttir, None, options, target)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    compiler = Compiler()
    monkeypatch.setattr(triton_lib, "compile_ttir_inplace", compiler)
    kernel_cache.install()
    return compiler


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path / kernel_cache.FOLDER
    jax.config.update("jax_compilation_cache_dir", before)


def test_a_kernel_is_compiled_once(compiler: Compiler, cache: Path):
    first, second = compiler.run(), compiler.run()
    assert compiler.times == 1
    assert first == RESULT
    assert (second.binary, second.name, second.shared_mem_bytes) == ("ptx", "kernel", 1024)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("other", [{"ttir": "other"}, {"options": "-O1"}, {"target": "sm_100"}])
def test_another_kernel_option_or_target_is_another_entry(
    compiler: Compiler, cache: Path, other: dict[str, str]
):
    compiler.run()
    compiler.run(**other)
    assert compiler.times == 2
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"binary": "ptx"}'], ids=repr)
def test_what_is_not_whole_is_compiled_again(compiler: Compiler, cache: Path, text: str):
    compiler.run()
    (entry,) = cache.iterdir()
    entry.write_text(text)
    assert compiler.run() == RESULT
    assert compiler.times == 2
    assert json.loads(entry.read_text())["binary"] == "ptx"


@pytest.mark.parametrize("name", [None, "gs://bucket/cache"])
def test_without_a_folder_nothing_is_kept(compiler: Compiler, cache: Path, name: str | None):
    jax.config.update("jax_compilation_cache_dir", name)
    compiler.run()
    compiler.run()
    assert compiler.times == 2
    assert not cache.exists()


def test_a_cache_that_is_switched_off_keeps_nothing(compiler: Compiler, cache: Path):
    jax.config.update("jax_enable_compilation_cache", False)
    compiler.run()
    jax.config.update("jax_enable_compilation_cache", True)
    assert not cache.exists()


def test_a_folder_that_cannot_be_written_to_warns_and_the_kernel_is_there(
    compiler: Compiler, cache: Path
):
    cache.write_text("a file in the folder's place")
    with pytest.warns(UserWarning, match="a compiled kernel is not kept"):
        assert compiler.run() == RESULT


def test_installing_twice_looks_once(compiler: Compiler):
    once = triton_lib.compile_ttir_inplace
    kernel_cache.install()
    assert triton_lib.compile_ttir_inplace is once
