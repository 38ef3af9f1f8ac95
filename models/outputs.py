"""Files that are either whole or not there."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside path; what was written there becomes path at the end.

    Where the body raises, nothing is left and an older file at path stays. The
    temporary name keeps path's suffix, which picks the format of a picture.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> with written(folder / "loss.csv") as temporary:
        ...     _ = temporary.write_text("step,loss")
        >>> [file.name for file in folder.iterdir()]
        ['loss.csv']
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        temporary = folder / path.name
        yield temporary
        if path.is_dir():
            # A folder cannot be replaced in one move: the old one is put aside first.
            path.rename(folder / "replaced")
        temporary.replace(path)
    finally:
        shutil.rmtree(folder)
