"""The parent's side of torch_worker: a contender that lives in another process."""

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.jax_contenders import Inputs
from benchmarks.rows import TRITON_SIGMOID
from sigjax.testing import DIRECTIONS, Direction, Workload

SCRIPT = Path(__file__).with_name("torch_worker.py")
# Tuning compiles and times some fifty kernels.
PREPARE_TIMEOUT_S = 300.0
BURST_TIMEOUT_S = 60.0


class WorkerError(RuntimeError):
    """The worker reported an error, ended or did not answer in time."""


class TorchContender:
    """triton-sigmoid, one burst at a time; idle while another contender runs.

    Args:
        command: starts a worker that speaks torch_worker's protocol.
        environment: of the worker; None takes this process's.
    """

    name = TRITON_SIGMOID

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=None if environment is None else dict(environment),
        )
        self._buffer = b""
        self.versions: dict[str, str] = {}

    def __enter__(self) -> "TorchContender":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def hello(self) -> str | None:
        """Waits until the package is imported; why it cannot be, or None."""
        reply = self._ask(PREPARE_TIMEOUT_S, op="hello")
        self.versions = reply.get("versions", {})
        return reply.get("missing")

    def refusal(self, workload: Workload) -> str | None:
        """None: the package takes every workload."""
        del workload

    def prepare(self, workload: Workload, inputs: Inputs | None, direction: Direction) -> None:
        """Lets the worker make inputs of its own, tune and run once."""
        del inputs
        self.send_prepare(workload, direction)
        self.receive(PREPARE_TIMEOUT_S)

    def send_prepare(self, workload: Workload, direction: Direction) -> None:
        """Asks without waiting for the answer."""
        self.send(op="prepare", workload=asdict(workload), direction=direction)

    def burst(self, calls: int) -> float:
        """Milliseconds per call, by the worker's CUDA events."""
        return float(self._ask(BURST_TIMEOUT_S, op="burst", calls=calls)["ms"])

    def release(self) -> None:
        """Frees the worker's device memory."""
        self._ask(BURST_TIMEOUT_S, op="release")

    def close(self) -> None:
        """Ends the worker: politely, then not."""
        for pipe in (self._process.stdin, self._process.stdout):
            # What could not be written to a worker that has ended is flushed again here.
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def kill(self) -> None:
        """Ends the worker at once, whatever it is doing."""
        self._process.kill()

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The next answer.

        Raises:
            WorkerError: it is an error, or none came.
        """
        line = self._read_line(timeout_s)
        reply = json.loads(line)
        if "error" in reply:
            msg = f"{self.name}: {reply['error']}"
            raise WorkerError(msg)
        return reply

    def _ask(self, timeout_s: float, **request: object) -> dict[str, Any]:
        self.send(**request)
        return self.receive(timeout_s)

    def send(self, **request: object) -> None:
        """Writes a request without waiting for its answer."""
        pipe = self._process.stdin
        try:
            if pipe is None or pipe.closed:
                self._fail("is closed")
            pipe.write(json.dumps(request).encode() + b"\n")
            pipe.flush()
        except BrokenPipeError:
            self._fail("has ended")

    def _read_line(self, timeout_s: float) -> bytes:
        pipe = self._process.stdout
        if pipe is None:
            self._fail("is closed")
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                # A late answer would be taken for that of the next request.
                self._process.kill()
                self._fail(f"did not answer within {timeout_s:g} s")
            chunk = os.read(pipe.fileno(), 1 << 16)
            if not chunk:
                self._fail("has ended")
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def _fail(self, what: str) -> NoReturn:
        log = ""
        if not self._log.closed:
            self._log.seek(0)
            log = self._log.read().decode(errors="replace")[-1000:].strip()
        msg = f"{self.name}: the worker {what}" + (f": {log}" if log else "")
        raise WorkerError(msg) from None


def worker_command(python: str, path: str | None) -> list[str]:
    """Starts torch_worker; -P keeps this folder's modules out of the worker's imports."""
    return [python or sys.executable, "-P", str(SCRIPT), *(["--path", path] if path else [])]


def worker_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what points at this process's Triton or changes the package's defaults."""
    kept = {"TRITON_CACHE_DIR"}
    return {
        name: value
        for name, value in environment.items()
        if name != "PYTHONPATH" and (name in kept or not name.startswith("TRITON_"))
    }


class Prewarming:
    """Workers that fill Triton's disk cache side by side, before anything is timed.

    Tuning compiles dozens of kernels, one after the other in one process. Each
    worker here takes a share of the shapes, with one sequence instead of a batch:
    the same kernels. What they would tune to is thrown away.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        jobs: Sequence[Workload],
        workers: int,
    ) -> None:
        shares = [jobs[i::workers] for i in range(min(workers, len(jobs)))]
        self._workers = [(TorchContender(command, environment), share) for share in shares]
        for worker, share in self._workers:
            worker.send(op="hello")
            for job in share:
                for direction in DIRECTIONS:
                    worker.send_prepare(job, direction)

    def finish(self) -> list[str]:
        """Waits for all of them; what went wrong, which costs time and nothing else."""
        problems = []
        for worker, share in self._workers:
            try:
                for _ in range(1 + len(DIRECTIONS) * len(share)):
                    worker.receive(PREPARE_TIMEOUT_S)
            except WorkerError as error:
                problems.append(str(error))
        self.close()
        return problems

    def close(self) -> None:
        """Ends all workers, finished or not."""
        for worker, _ in self._workers:
            worker.kill()
            worker.close()


def prewarm_jobs(workloads: Sequence[Workload]) -> list[Workload]:
    """One sequence of each shape that has kernels of its own: T, head size, padded or not."""
    single = {
        (w.length, w.head_size, w.lengths is None): replace(
            w, batch=1, lengths=None if w.lengths is None else w.lengths[:1]
        )
        for w in workloads
    }
    return sorted(single.values(), key=lambda w: (-w.length, w.head_size))
