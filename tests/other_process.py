"""A process with other settings, such as eight simulated devices, that runs tests' functions.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.other_process

Each line of the input names a function of a module and its arguments as JSON; the answer is a
line of JSON, null where all is well. Tests use ``OtherProcess`` and start one process a session.
"""

import importlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any


class OtherProcess:
    """The client: starts the process on first use.

    Args:
        settings: environment variables; XLA_FLAGS are added to those there are.
    """

    def __init__(self, **settings: str) -> None:
        self._settings = settings
        self._process: subprocess.Popen[str] | None = None

    def check(self, module: str, function: str, *arguments: Any) -> str | None:
        """Runs a function over there; its error, or None."""
        if self._process is None:
            flags = " ".join([os.environ.get("XLA_FLAGS", ""), self._settings.get("XLA_FLAGS", "")])
            environment = {**os.environ, "JAX_PLATFORMS": "cpu", **self._settings}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.other_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parents[1],
                env={**environment, "XLA_FLAGS": flags.strip()},
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([module, function, arguments]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        return json.loads(answer) if answer else f"the process with {self._settings} died"

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.communicate()


def main() -> None:
    """Answers until the input ends."""
    import jax

    jax.config.update("jax_numpy_rank_promotion", "raise")
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        module, function, arguments = json.loads(line)
        try:
            getattr(importlib.import_module(module), function)(*arguments)
            answer = None
        except Exception:  # noqa: BLE001 (the test on the other side raises it)
            answer = traceback.format_exc()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
