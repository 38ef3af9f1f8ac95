"""Which stores there are under some paths, and digests that say whether they are what they were.

A manifest is a table as sha256sum writes it: a SHA-256 digest, two spaces, and
a file's path relative to the manifest's folder. Of a zarr store it lists every file.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sigjax.models.config import InputError
from sigjax.models.store_reader import is_zarr

LINE = re.compile(r"^([0-9a-fA-F]{64}) [ *](.+)$")


def find_stores(paths: Sequence[Path]) -> tuple[Path, ...]:
    """Files and stores that paths name, where a path may be a folder of them.

    A folder gives its .h5ad files and .zarr stores in order of their names, then
    those of its own folders, but not of folders in them.

    Raises:
        InputError: a folder without any, or a store that is named twice.
    """
    stores: list[Path] = []
    for path in paths:
        if not path.is_dir() or is_zarr(path):
            stores.append(path)
            continue
        inner = [p for p in sorted(path.iterdir()) if p.is_dir() and not _is_store(p)]
        found = [store for folder in (path, *inner) for store in _stores_in(folder)]
        if not found:
            msg = (
                f"{path}: no .h5ad file and no .zarr store in this folder or in its folders; "
                "give the folder that holds them"
            )
            raise InputError(msg)
        stores += found
    places = [path.resolve() for path in stores]
    for i, place in enumerate(places):
        if place in places[:i]:
            msg = f"{stores[i]}: named twice; its cells would count twice, so name it once"
            raise InputError(msg)
    return tuple(stores)


def write_manifest(stores: Iterable[Path], path: Path) -> int:
    """Writes the digests of all files of stores; returns how many files there are.

    Raises:
        InputError: a store that does not exist.
    """
    from sigjax.models.outputs import written

    base = path.parent.resolve()
    lines = []
    for store in stores:
        if not store.exists():
            msg = f"{store}: no such file; give .h5ad files, zarr stores or folders of them"
            raise InputError(msg)
        lines += [f"{digest(file)}  {_relative(file, base)}\n" for file in sorted(files_of(store))]
    with written(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def read_manifest(path: Path) -> dict[Path, str]:
    """Digests by the resolved path of their file.

    Raises:
        InputError: no such file, or no manifest.
    """
    if not path.is_file():
        msg = f"{path}: no such manifest; sigjax manifest DATA... --out FILE writes one"
        raise InputError(msg)
    base = path.parent.resolve()
    digests: dict[Path, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        msg = f"{path}: must be text in UTF-8, as sha256sum writes it"
        raise InputError(msg) from error
    for number, line in enumerate(lines, 1):
        found = LINE.match(line)
        if found is None:
            msg = (
                f"{path}: line {number} must be a SHA-256 digest, two spaces and a path, "
                f"got {line[:80]!r}; write it again by sigjax manifest"
            )
            raise InputError(msg)
        digests[(base / found[2]).resolve()] = found[1].lower()
    return digests


def verify(store: Path, digests: dict[Path, str], manifest: Path) -> None:
    """Compares all bytes of a store with a manifest, before anything else reads it.

    Raises:
        InputError: a file that is not listed, is gone, or has another digest.
    """
    if not store.exists():
        msg = f"{store}: no such file; give the path of an .h5ad file or a zarr store"
        raise InputError(msg)
    here = {file.resolve(): file for file in files_of(store)}
    root = store.resolve()
    listed = {file for file in digests if file == root or file.is_relative_to(root)}
    for file in sorted(listed - set(here)):
        msg = f"{store}: {file.name} is listed in {manifest} but gone; copy the store again"
        raise InputError(msg)
    for place, file in here.items():
        if place not in digests:
            msg = (
                f"{file}: not listed in {manifest}; write the manifest again by sigjax manifest "
                "if the file is meant to be there"
            )
            raise InputError(msg)
        if digest(file) != digests[place]:
            msg = (
                f"{file}: its bytes are not those that {manifest} lists: damaged or changed; "
                "copy it again from where it is whole"
            )
            raise InputError(msg)


def digest(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_of(store: Path) -> Iterator[Path]:
    """A file itself, or all files of a zarr store; anything else in it is the guard's to refuse."""
    if store.is_dir():
        yield from (path for path in store.rglob("*") if path.is_file())
    else:
        yield store


def _stores_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if _is_store(path)]


def _is_store(path: Path) -> bool:
    if path.is_dir():
        return is_zarr(path)
    return path.suffix == ".h5ad"


def _relative(file: Path, base: Path) -> Path:
    place = file.resolve()
    return place.relative_to(base, walk_up=True)
