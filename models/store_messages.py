"""Messages between a process and its reader: a line of JSON, then the bytes of arrays.

Nothing is pickled in either direction, so that no file can smuggle code across.
"""

import json
import math
from collections.abc import Sequence
from typing import IO, Any

import numpy as np

# Starts a line of the reader's stderr that names the field it looks at next.
MARK = "@ "


def write_message(out: IO[bytes], header: dict[str, Any], arrays: Sequence[np.ndarray]) -> None:
    """Writes a header and arrays of numbers as one message."""
    about = [[array.dtype.str, list(array.shape)] for array in arrays]
    out.write(json.dumps({**header, "arrays": about}).encode() + b"\n")
    for array in arrays:
        if array.size:
            out.write(memoryview(np.ascontiguousarray(array)).cast("B"))
    out.flush()


def read_array(source: IO[bytes], dtype: str, shape: Sequence[int]) -> np.ndarray:
    """Reads one array of a message.

    Raises:
        EOFError: the other end is gone.
    """
    kind = np.dtype(dtype)
    size = math.prod(shape) * kind.itemsize
    data = bytearray(source.read(size))
    if len(data) != size:
        raise EOFError
    return np.frombuffer(data, kind).reshape(shape)
