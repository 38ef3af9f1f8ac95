"""PyPI's triton-sigmoid in a process of its own, driven line by line.

The parent writes one JSON object a line to standard input and reads one back:

    {"op": "hello"}                                → {"versions": {...}} or {"missing": "why"}
    {"op": "prepare", "workload": {...}, "direction": "forward"}          → {}
    {"op": "burst", "calls": 12}                   → {"ms": 1.9}
    {"op": "release"}                              → {}

and {"error": "..."} for what went wrong. Between two lines the device is idle. This
file imports nothing of the repository: it runs beside another Triton than the
parent's, with the package's own autotuning, in `prepare`, outside of every timing.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from typing import Any, Protocol, TextIO


class Backend(Protocol):
    """What answers the parent's requests."""

    def hello(self) -> dict[str, Any]:
        """Versions, or why there are none."""
        ...

    def prepare(self, workload: dict[str, Any], direction: str) -> None:
        """Makes inputs and runs once, tuning included."""
        ...

    def burst(self, calls: int) -> float:
        """Milliseconds per call."""
        ...

    def release(self) -> None:
        """Frees device memory."""
        ...


class TritonSigmoid:
    """The package's public functions, with its default (tanh) sigmoid."""

    def __init__(self) -> None:
        self._torch: Any = None
        self._package: Any = None
        self._call: Callable[[], Any] | None = None

    def hello(self) -> dict[str, Any]:
        """Imports torch and triton_sigmoid, whose import fails without a GPU."""
        try:
            self._torch = importlib.import_module("torch")
            self._package = importlib.import_module("triton_sigmoid")
        except (ImportError, RuntimeError) as error:
            return {"missing": f"{type(error).__name__}: {error}"}
        names = {"torch": "torch", "worker_triton": "triton", "triton_sigmoid": "triton-sigmoid"}
        return {"versions": {key: _version(name) for key, name in names.items()}}

    def prepare(self, workload: dict[str, Any], direction: str) -> None:
        """Draws inputs, tunes and runs once."""
        torch = self._torch
        shape = [workload[size] for size in ("batch", "length", "heads", "head_size")]
        generator = torch.Generator("cuda").manual_seed(workload["seed"])
        dtype = getattr(torch, workload["dtype"])
        query, key, value, cotangent = (
            torch.randn(shape, device="cuda", dtype=dtype, generator=generator) for _ in range(4)
        )
        lengths = workload["lengths"]
        if lengths is not None:
            lengths = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        operands = (query, key, value)
        if direction == "forward":
            self._call = lambda: self._attention(*operands, lengths)
        else:
            for x in operands:
                x.requires_grad_()
            output = self._attention(*operands, lengths)
            self._call = lambda: torch.autograd.grad(output, operands, cotangent, retain_graph=True)
        result = self._call()
        torch.cuda.synchronize()
        if direction == "forward" and not bool(torch.isfinite(result).all()):
            msg = "triton_sigmoid's output is not finite"
            raise RuntimeError(msg)

    def burst(self, calls: int) -> float:
        """Times calls by CUDA events, behind one call that keeps the device busy meanwhile."""
        if self._call is None:
            msg = "prepare must come before burst"
            raise RuntimeError(msg)
        start, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._call()
        start.record()
        for _ in range(calls):
            self._call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls

    def release(self) -> None:
        """Gives the allocator's memory back to the device, for the parent."""
        self._call = None
        self._torch.cuda.empty_cache()

    def _attention(self, query: Any, key: Any, value: Any, lengths: Any) -> Any:
        if lengths is None:
            return self._package.sigmoid_attention(query, key, value, is_causal=False)
        return self._package.sigmoid_attention_padded(
            query, key, value, seq_lens_q=lengths, seq_lens_k=lengths
        )


def serve(backend: Backend, requests: TextIO, replies: TextIO) -> None:
    """Answers requests, one a line, until their end."""
    for line in requests:
        try:
            reply = _answer(backend, json.loads(line))
        # What torch, Triton and the package raise has no common base; the parent gets it whole.
        except Exception as error:  # noqa: BLE001
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _answer(backend: Backend, request: dict[str, Any]) -> dict[str, Any]:
    match request:
        case {"op": "hello"}:
            return backend.hello()
        case {"op": "prepare", "workload": workload, "direction": direction}:
            backend.prepare(workload, direction)
        case {"op": "burst", "calls": calls}:
            return {"ms": backend.burst(calls)}
        case {"op": "release"}:
            backend.release()
        case _:
            msg = f"op must be hello, prepare, burst or release with its fields, got {request}"
            raise ValueError(msg)
    return {}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        module = importlib.import_module(name.replace("-", "_"))
        return str(getattr(module, "__version__", "unknown"))


def main() -> None:
    """Serves standard input; whatever libraries print goes to standard error."""
    parser = argparse.ArgumentParser(description="Worker of benchmarks.attention.")
    parser.add_argument("--path", help="folder that holds the package triton_sigmoid")
    path = parser.parse_args().path
    if path is not None:
        sys.path.insert(0, path)
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)
        serve(TritonSigmoid(), sys.stdin, replies)


if __name__ == "__main__":
    main()
