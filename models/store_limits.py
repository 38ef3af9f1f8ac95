"""What the reader of untrusted files may use, and how it says no."""

import math
from dataclasses import dataclass
from typing import NoReturn

from sigjax.models.config import InputError

GIB = 2**30
REWRITE = "write the file again with anndata's write_h5ad or write_zarr"


@dataclass(frozen=True)
class Limits:
    """Budgets of the reader.

    Attributes:
        whole_gib: what has to be in memory at once: names, labels, a csc matrix, one storage
            chunk of anything.
        streamed_gib: size of an array that is streamed, as its shape and dtype claim it.
        seconds: for a file's checks, and for each block of rows after them.

    Raises:
        InputError: a budget that is not positive.
    """

    whole_gib: float = 4.0
    streamed_gib: float = 1024.0
    seconds: float = 10.0

    def __post_init__(self) -> None:
        for name in ("whole_gib", "streamed_gib", "seconds"):
            if not getattr(self, name) > 0:
                msg = f"{name} must be positive, got {getattr(self, name)}"
                raise InputError(msg)

    def check_size(
        self, field: str, shape: tuple[int, ...], itemsize: int, chunks: tuple[int, ...] | None
    ) -> None:
        """Raises InputError where an array or one of its storage chunks is over its budget."""
        size = math.prod(shape) * itemsize
        if size > self.streamed_gib * GIB:
            refuse(
                field,
                f"shape {shape} needs {size / GIB:,.0f} GiB, over the budget of "
                f"{self.streamed_gib:g} GiB",
                "check the file, or raise the limit (streamed_gib)",
            )
        if chunks is not None:
            self.check_whole(f"{field}: one chunk", math.prod(chunks) * itemsize)

    def check_whole(self, field: str, size: int) -> None:
        """Raises InputError where size bytes that are needed at once are over the budget."""
        if size > self.whole_gib * GIB:
            refuse(
                field,
                f"needs {size / GIB:,.1f} GiB at once, over the budget of {self.whole_gib:g} GiB",
                "store it as csr or in smaller chunks, or raise the budget (--budget-gib)",
            )


def refuse(field: str, problem: str, remedy: str = REWRITE) -> NoReturn:
    """Raises InputError that names a field of a file, what is wrong with it and what helps."""
    msg = f"{field or '/'}: {problem}; {remedy}"
    raise InputError(msg)
