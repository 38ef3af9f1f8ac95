"""The process that reads untrusted files, seen from the one that must not crash with it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from sigjax.models.config import InputError
from sigjax.models.store_limits import REWRITE
from sigjax.models.store_messages import MARK, read_array, write_message

# The child needs a few modules of sigjax.models and none of jax, whose import takes a second.
START = """
import sys, types
for name, folder in (("sigjax", []), ("sigjax.models", [sys.argv[1]])):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = folder
from sigjax.models.store_worker import main
main()
"""


class StoreChild:
    """One process that runs sigjax.models.store_worker, and what it said."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 it lives as long as the child
        # Filters of other libraries are refused, so none of them is to be loaded.
        settings = {**os.environ, "HDF5_PLUGIN_PRELOAD": "::", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-c", START, str(Path(__file__).parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=settings,
        )
        self._late = False

    def send(self, request: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
        """Sends a request."""
        # Where it died before it listened, receive says why.
        with suppress(BrokenPipeError):
            write_message(_open(self._process.stdin), request, arrays)

    def receive(self, seconds: float) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Takes one answer.

        Raises:
            InputError: there is an error in it, or there was none within seconds, or the process
                is dead; it is not to be used any more then.
        """
        pipe = _open(self._process.stdout)
        watchdog = threading.Timer(seconds, self._kill_late)
        watchdog.daemon = True
        watchdog.start()
        try:
            header: dict[str, Any] = json.loads(pipe.readline() or b"{}")
            arrays = [read_array(pipe, *about) for about in header.pop("arrays")]
        except (EOFError, KeyError, ValueError):
            # Half a message, or none: it was killed or killed itself.
            raise InputError(self._last_words(seconds)) from None
        finally:
            watchdog.cancel()
        if "error" in header:
            raise InputError(header["error"])
        return header, arrays

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _kill_late(self) -> None:
        self._late = True
        self._process.kill()

    def _last_words(self, seconds: float) -> str:
        """What it was doing when it died, as an error for the user."""
        self._process.kill()
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").splitlines()
        marks = [line.removeprefix(MARK) for line in lines if line.startswith(MARK)]
        field = (marks[-1].strip("'\"") if marks else "") or "/"
        if self._late:
            return (
                f"{field}: took longer than {seconds:g} s; {REWRITE}, or allow more "
                "(--guard-seconds)"
            )
        if status < 0:
            name = signal.Signals(-status).name
            return f"{field}: damaged: the library that reads it crashed ({name}); {REWRITE}"
        others = [line for line in lines if not line.startswith(MARK)]
        last = others[-1][:160] if others else f"status {status}"
        return f"{field}: damaged: the reader stopped ({last}); {REWRITE}"


def _open(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        msg = "the pipe to the reader was never opened"
        raise RuntimeError(msg)
    return pipe
