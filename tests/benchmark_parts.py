"""What several tests of the benchmark use: a tiny workload, a cool card, a worker without torch."""

import sys
import textwrap
from pathlib import Path

from benchmarks.clocks import ClockState
from sigjax.testing import (
    Workload,
)

ROOT = Path(__file__).resolve().parent.parent
COOL = ClockState(1980, 50, 0)
TINY = Workload("padded25", 2, 32, 2, 16, (32, 24))

FAKE_WORKER = """
    import os, sys, time
    sys.path.insert(0, {root!r})
    from benchmarks.torch_worker import serve

    class Fake:
        prepared = None
        def hello(self):
            return {hello!r}
        def prepare(self, workload, direction):
            if workload["length"] == 13:
                raise RuntimeError("out of memory")
            self.prepared = workload, direction
        def burst(self, calls):
            if calls == 99:
                print("a last word", file=sys.stderr, flush=True)
                os._exit(3)
            if calls == 98:
                time.sleep(60)
            return self.prepared[0]["length"] / 1000
        def release(self):
            self.prepared = None

    serve(Fake(), sys.stdin, sys.stdout)
"""
VERSIONS = {"torch": "2", "worker_triton": "3.6", "triton_sigmoid": "0.1.2"}


def fake_worker(folder: Path, hello: dict | None = None) -> list[str]:
    script = folder / "fake_worker.py"
    reply = {"versions": VERSIONS} if hello is None else hello
    script.write_text(textwrap.dedent(FAKE_WORKER).format(root=str(ROOT), hello=reply))
    return [sys.executable, str(script)]
