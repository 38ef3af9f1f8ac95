"""What a zarr store may hold: read from its JSON files before zarr opens it.

Runs in the reader's child process only (see sigjax.models.store_worker).
"""

import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sigjax.models.store_limits import REWRITE, refuse

MOST_FILES = 10_000_000
LARGEST_METADATA = 64 * 2**20
METADATA = frozenset((".zarray", ".zgroup", ".zattrs", ".zmetadata", "zarr.json"))
# Codecs that turn bytes into bytes, numbers or text; json2, pickle and msgpack build objects.
CODECS_V2 = frozenset(
    ("blosc", "bz2", "gzip", "lz4", "lzma", "shuffle", "vlen-utf8", "zlib", "zstd")
)
CODECS_V3 = frozenset(
    ("blosc", "bytes", "crc32c", "gzip", "sharding_indexed", "transpose", "vlen-utf8", "zstd")
)
NUMBERS_V3 = [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
TYPES_V3 = frozenset(
    (*NUMBERS_V3, "float16", "float32", "float64", "bool", "string", "fixed_length_utf32")
)


def check_store(store: Path, mark: Callable[[str], None]) -> None:
    """Walks all files of a store.

    Args:
        store: its root folder.
        mark: is told each file before it is read, for the message of a crash.

    Raises:
        InputError: a link out of the store, something that is no plain file, metadata that are
            no JSON object, or a codec or type outside the lists above.
    """
    for path in _files(store):
        if path.name not in METADATA:
            continue
        field = str(path.relative_to(store))
        mark(field)
        about = _metadata(path, field)
        if path.name == ".zarray":
            _check_v2(about, field)
        elif path.name == "zarr.json":
            _check_v3(about, field)


def _files(store: Path) -> Iterator[Path]:
    root = store.resolve()
    waiting, count = [store], 0
    while waiting:
        for path in waiting.pop().iterdir():
            count += 1
            field = str(path.relative_to(store))
            if count > MOST_FILES:
                refuse(field, f"the store holds over {MOST_FILES:,} files", "use larger chunks")
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                refuse(field, "a link out of the store", "copy the file it points to")
            mode = path.stat().st_mode
            # Links inside the store are no cycle as long as only real folders are entered.
            if stat.S_ISDIR(mode) and not path.is_symlink():
                waiting.append(path)
            elif stat.S_ISREG(mode):
                yield path
            elif not stat.S_ISDIR(mode):
                refuse(field, "neither a file nor a folder", "remove it from the store")


def _metadata(path: Path, field: str) -> dict[str, Any]:
    if path.stat().st_size > LARGEST_METADATA:
        refuse(field, f"metadata over {LARGEST_METADATA:,} bytes")
    try:
        about = json.loads(path.read_bytes())
    except (RecursionError, ValueError) as error:
        refuse(field, f"no JSON ({type(error).__name__})")
    if not isinstance(about, dict):
        refuse(field, f"must be a JSON object, got {type(about).__name__}")
    return about


def _check_v2(about: dict[str, Any], field: str) -> None:
    filters = about.get("filters") or []
    for codec in [about.get("compressor"), *filters]:
        if codec is not None:
            name = codec.get("id") if isinstance(codec, dict) else codec
            _check_codec(name, CODECS_V2, field)
    dtype = about.get("dtype")
    text = any(codec.get("id") == "vlen-utf8" for codec in filters)
    if not isinstance(dtype, str) or (dtype == "|O" and not text):
        refuse(field, f"dtype {dtype!r} holds objects", "store numbers and text only")
    _check_shape(about.get("shape"), about.get("chunks"), field)


def _check_v3(about: dict[str, Any], field: str) -> None:
    if about.get("node_type") == "group":
        return
    if about.get("node_type") != "array":
        refuse(field, f"node_type must be 'array' or 'group', got {about.get('node_type')!r}")
    if about.get("storage_transformers"):
        refuse(field, "storage transformers are not known")
    _check_codecs_v3(about.get("codecs"), field)
    dtype = about.get("data_type")
    if isinstance(dtype, dict):
        dtype = dtype.get("name")
    if dtype not in TYPES_V3:
        refuse(field, f"data_type {dtype!r} is not known", "store numbers and text only")
    grid = about.get("chunk_grid")
    inner = grid.get("configuration") if isinstance(grid, dict) else None
    chunks = inner.get("chunk_shape") if isinstance(inner, dict) else None
    _check_shape(about.get("shape"), chunks, field)


def _check_codecs_v3(codecs: object, field: str) -> None:
    if not isinstance(codecs, list):
        refuse(field, "codecs must be a list")
    for codec in codecs:
        name = codec.get("name") if isinstance(codec, dict) else codec
        _check_codec(name, CODECS_V3, field)
        if name == "sharding_indexed":
            inner = codec.get("configuration") or {}
            _check_codecs_v3(inner.get("codecs"), field)
            _check_codecs_v3(inner.get("index_codecs"), field)


def _check_codec(name: object, known: frozenset[str], field: str) -> None:
    if name not in known:
        refuse(field, f"codec must be one of {', '.join(sorted(known))}, got {name!r}", REWRITE)


def _check_shape(shape: object, chunks: object, field: str) -> None:
    lengths = _axes(shape, 0, f"{field}: shape"), _axes(chunks, 1, f"{field}: chunks")
    if len(lengths[0]) != len(lengths[1]):
        refuse(field, f"shape {shape} and chunks {chunks} have different lengths")


def _axes(axes: object, least: int, field: str) -> list[int]:
    if not isinstance(axes, list) or not all(type(n) is int and least <= n < 2**62 for n in axes):
        refuse(field, f"must be a list of integers from {least} on, got {axes!r}")
    return axes
