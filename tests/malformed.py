"""Makes malformed AnnData stores, and counts what becomes of them: python tests/malformed.py.

Half are whole stores with random damage (a flipped bit, a burst, a cut), half have
one thing wrong that an attacker or a broken program would put there.
"""

import argparse
import collections
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from sigjax.models.config import InputError
from sigjax.models.intake import take_in
from sigjax.models.manifest import read_manifest, verify, write_manifest
from sigjax.models.outputs import written
from sigjax.models.sources import open_source
from sigjax.models.spool import Spool
from sigjax.models.store_limits import Limits
from sigjax.models.store_reader import StoreReader
from sigjax.models.vocabulary import Vocabulary

CELLS, GENES = 60, 80
SECONDS = 10.0

type Change = Callable[[h5py.File], None]
type Entries = tuple[np.ndarray, np.ndarray, np.ndarray]


def cells() -> anndata.AnnData:
    """Counts of two types of cells."""
    rng = np.random.default_rng(7)
    rates = np.where(np.arange(GENES) % 2 == rng.integers(0, 2, CELLS)[:, None], 2.0, 0.3)
    return anndata.AnnData(
        sp.csr_matrix(rng.poisson(rates).astype(np.float32)),
        obs=pd.DataFrame(
            {"cell_type": pd.Categorical(rng.choice(["T", "B"], CELLS))},
            index=[f"cell-{i}" for i in range(CELLS)],
        ),
        var=pd.DataFrame(index=[f"GENE{i}" for i in range(GENES)]),
    )


def write_stores(folder: Path) -> dict[str, Path]:
    """Whole stores of the same cells, in every format and storage."""
    stores = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, kind, compression in (
            ("csr", sp.csr_matrix, None),
            ("gzip", sp.csr_matrix, "gzip"),
            ("csc", sp.csc_matrix, "gzip"),
            ("dense", np.asarray, "lzf"),
        ):
            data = cells()
            counts = sp.csr_matrix(data.X)
            data.X = counts.toarray() if kind is np.asarray else kind(counts)
            stores[name] = folder / f"{name}.h5ad"
            data.write_h5ad(stores[name], compression=compression)
        for version in (2, 3):
            stores[f"zarr{version}"] = folder / f"zarr{version}.zarr"
            with anndata.settings.override(zarr_write_format=version):
                cells().write_zarr(stores[f"zarr{version}"])
    return stores


def _flip(data: bytearray, rng: np.random.Generator) -> None:
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))


def _flip_header(data: bytearray, rng: np.random.Generator) -> None:
    data[rng.integers(min(len(data), 4096))] ^= 1 << int(rng.integers(8))


def _burst(data: bytearray, rng: np.random.Generator) -> None:
    start = int(rng.integers(len(data)))
    size = int(rng.integers(1, 65))
    data[start : start + size] = rng.bytes(min(size, len(data) - start))


def _zeros(data: bytearray, rng: np.random.Generator) -> None:
    start = int(rng.integers(len(data)))
    size = min(512, len(data) - start)
    data[start : start + size] = bytes(size)


def _cut(data: bytearray, rng: np.random.Generator) -> None:
    del data[int(rng.integers(len(data))) :]


def _swap(data: bytearray, rng: np.random.Generator) -> None:
    start, other = rng.integers(max(len(data) - 64, 1), size=2)
    data[start : start + 64], data[other : other + 64] = (
        data[other : other + 64],
        data[start : start + 64],
    )


DAMAGES = {
    "flip": _flip,
    "header": _flip_header,
    "burst": _burst,
    "zeros": _zeros,
    "cut": _cut,
    "swap": _swap,
}


def spoil(store: Path, rng: np.random.Generator) -> str:
    """Damages a random place of a store; says how."""
    file = store
    if store.is_dir():
        files = sorted(p for p in store.rglob("*") if p.is_file())
        file = files[rng.integers(len(files))]
        if rng.random() < 0.1:
            file.unlink()
            return "unlink"
    name = str(rng.choice(list(DAMAGES)))
    # An empty file has no place to damage.
    data = bytearray(file.read_bytes() or b"\0")
    DAMAGES[name](data, rng)
    if data == file.read_bytes():
        # Zeros over zeros: no damage yet.
        data += b"\0"
    file.write_bytes(data)
    return name


def replaced(file: h5py.File, field: str, values: object, **options: object) -> None:
    """Puts another dataset in the place of one, its attributes kept."""
    attributes = dict(file[field].attrs)
    del file[field]
    dataset = file.create_dataset(field, data=values, **options)
    dataset.attrs.update(attributes)


def changed(field: str, place: object, value: object) -> Change:
    """Writes a value into a dataset."""

    def change(file: h5py.File) -> None:
        file[field][place] = value

    return change


def _external_storage(file: h5py.File) -> None:
    size = file["X/data"].shape[0]
    del file["X/data"]
    other = Path(file.filename).with_suffix(".bin")
    other.write_bytes(np.ones(size, np.float32).tobytes())
    file.create_dataset("X/data", (size,), np.float32, external=[(str(other), 0, 4 * size)])


def _virtual(file: h5py.File) -> None:
    size = file["X/data"].shape[0]
    del file["X/data"]
    layout = h5py.VirtualLayout((size,), np.float32)
    layout[:] = h5py.VirtualSource("other.h5", "data", (size,))
    file.create_virtual_dataset("X/data", layout)


def _external_link(file: h5py.File) -> None:
    del file["X/data"]
    file["X/data"] = h5py.ExternalLink("other.h5", "/data")


def _hidden_link(file: h5py.File) -> None:
    file["uns"]["other"] = h5py.ExternalLink("/etc/passwd", "/data")


def _long_link(file: h5py.File) -> None:
    file["uns/out"] = h5py.ExternalLink("other.h5", "/")
    file["X/a"] = h5py.SoftLink("/uns/out/data")


def _loose_link(file: h5py.File) -> None:
    del file["X/data"]
    file["X/data"] = h5py.SoftLink("/nowhere")


def _chunk(file: h5py.File, number: int, options: tuple[int, ...], data: bytes) -> None:
    """X/data as one chunk that went through a filter, or says so."""
    size = file["X/data"].shape[0]
    del file["X/data"]
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((size,))
    properties.set_filter(number, h5py.h5z.FLAG_OPTIONAL, options)
    space = h5py.h5s.create_simple((size,))
    dataset = h5py.h5d.create(file["X"].id, b"data", h5py.h5t.IEEE_F32LE, space, dcpl=properties)
    dataset.write_direct_chunk((0,), data)


def _unknown_filter(file: h5py.File) -> None:
    _chunk(file, 32015, (3,), bytes(100))


def _bomb(file: h5py.File) -> None:
    _chunk(file, h5py.h5z.FILTER_DEFLATE, (9,), zlib.compress(bytes(2**26), 9))


def _huge(file: h5py.File) -> None:
    for name in ("data", "indices"):
        replaced(file, f"X/{name}", None, shape=(2**50,), dtype="i4", chunks=(1024,))


def _huge_dense(file: h5py.File) -> None:
    attributes = {"encoding-type": "array", "encoding-version": "0.2.0"}
    del file["X"]
    file.create_dataset("X", (CELLS, 2**44), np.float32, chunks=(1, 1024)).attrs.update(attributes)


def _huge_chunk(file: h5py.File) -> None:
    size = file["X/data"].shape[0]
    data = file["X/data"][:]
    replaced(file, "X/data", None, shape=(size,), maxshape=(None,), dtype="f8", chunks=(2**31,))
    del data


def _objects(file: h5py.File) -> None:
    size = file["X/data"].shape[0]
    replaced(file, "X/data", ["1"] * size, dtype=h5py.string_dtype())


def _pickles(file: h5py.File) -> None:
    size = file["X/data"].shape[0]
    replaced(file, "X/data", np.full(size, np.void(b"\x80\x04K\x01.")))


def _compound(file: h5py.File) -> None:
    pair = np.dtype([("a", "f4"), ("b", "f4")])
    replaced(file, "X/data", np.zeros(file["X/data"].shape, pair))


def _nested(file: h5py.File) -> None:
    group = file["uns"]
    for _ in range(60):
        group = group.create_group("deeper")


def _renamed(field: str, name: bytes) -> Change:
    def change(file: h5py.File) -> None:
        file[field][1] = name

    return change


def _attribute(field: str, name: str, value: object) -> Change:
    def change(file: h5py.File) -> None:
        file[field].attrs[name] = value

    return change


def _without(field: str) -> Change:
    def change(file: h5py.File) -> None:
        del file[field]

    return change


def _shorter(field: str) -> Change:
    def change(file: h5py.File) -> None:
        replaced(file, field, file[field][:-1])

    return change


# One thing wrong each, in csr.h5ad.
TRAPS: dict[str, Change] = {
    "external link": _external_link,
    "external link elsewhere": _hidden_link,
    "link through an external link": _long_link,
    "link to nothing": _loose_link,
    "external storage": _external_storage,
    "virtual dataset": _virtual,
    "unknown filter": _unknown_filter,
    "deflate bomb": _bomb,
    "shape over the budget": _huge,
    "dense shape over the budget": _huge_dense,
    "chunk over the budget": _huge_chunk,
    "text for numbers": _objects,
    "pickles for numbers": _pickles,
    "compounds for numbers": _compound,
    "groups without end": _nested,
    "indptr from 1": changed("X/indptr", 0, 1),
    "indptr falls": changed("X/indptr", 3, 10_000),
    "indptr below 0": changed("X/indptr", 3, -1),
    "indptr ends early": changed("X/indptr", CELLS, 3),
    "index out of range": changed("X/indices", 5, GENES),
    "index below 0": changed("X/indices", 5, -1),
    "index far out of range": changed("X/indices", 5, 2**31 - 1),
    "gene twice in a cell": changed("X/indices", slice(0, 2), [4, 4]),
    "NaN": changed("X/data", 9, np.nan),
    "infinite": changed("X/data", 9, np.inf),
    "negative": changed("X/data", 9, -1),
    "neither count nor logarithm": changed("X/data", 9, 812.5),
    "repeated gene": _renamed("var/_index/values", b"GENE0"),
    "repeated cell": _renamed("obs/_index/values", b"cell-0"),
    "names that are no text": _renamed("var/_index/values", b"\xff\xfe\x80"),
    "another shape": _attribute("X", "shape", [CELLS, GENES + 1]),
    "shape of one axis": _attribute("X", "shape", [CELLS]),
    "unknown encoding": _attribute("X", "encoding-type", "coo_matrix"),
    "index that is no column": _attribute("var", "_index", "nowhere"),
    "no obs": _without("obs"),
    "no var": _without("var"),
    "no X": _without("X"),
    "no indptr": _without("X/indptr"),
    "fewer values than indices": _shorter("X/data"),
    "fewer pointers than cells": _shorter("X/indptr"),
    "fewer names than genes": _shorter("var/_index/values"),
}


def metadata_change(
    name: str, field: str, change: Callable[[dict], None]
) -> Callable[[Path], None]:
    """Edits a JSON file of a zarr store."""

    def edit(store: Path) -> None:
        file = store / field / name
        about = json.loads(file.read_text())
        change(about)
        file.write_text(json.dumps(about))

    return edit


def _v2(change: Callable[[dict], None], field: str = "X/data") -> Callable[[Path], None]:
    return metadata_change(".zarray", field, change)


def _link_out(store: Path) -> None:
    file = store / "X/data/0"
    shutil.move(file, store.parent / "moved")
    file.symlink_to(store.parent / "moved")


def _folder_out(store: Path) -> None:
    shutil.move(store / "X/data", store.parent / "moved")
    (store / "X/data").symlink_to(store.parent / "moved", target_is_directory=True)


def _pipe(store: Path) -> None:
    (store / "X/data/0").unlink()
    os.mkfifo(store / "X/data/0")


def _deep_json(store: Path) -> None:
    (store / "X/data/.zattrs").write_text("[" * 100_000 + "]" * 100_000)


# One thing wrong each, in zarr2.zarr.
ZARR_TRAPS: dict[str, Callable[[Path], None]] = {
    "link out of the store": _link_out,
    "folder out of the store": _folder_out,
    "pipe for a chunk": _pipe,
    "JSON without end": _deep_json,
    "pickle codec": _v2(lambda a: a.update(filters=[{"id": "pickle"}], dtype="|O")),
    "unknown codec": _v2(lambda a: a.update(compressor={"id": "zfpy"})),
    "objects": _v2(lambda a: a.update(dtype="|O", compressor=None)),
    "dtype that is none": _v2(lambda a: a.update(dtype="<f99")),
    "shape over the budget in a store": _v2(lambda a: a.update(shape=[2**60])),
    "chunk over the budget in a store": _v2(lambda a: a.update(chunks=[2**60])),
    "shape below 0": _v2(lambda a: a.update(shape=[-1])),
    "shape of text": _v2(lambda a: a.update(shape="many")),
    "chunk gone": lambda store: (store / "X/indices/0").unlink(),
    "array gone": lambda store: shutil.rmtree(store / "X/indptr"),
}


@dataclass(frozen=True)
class Made:
    """A malformed store.

    Attributes:
        path: where it is.
        kind: what is wrong with it.
        trap: whether it has to be refused, because what it holds cannot be right.
        original: the whole store.
    """

    path: Path
    kind: str
    trap: bool
    original: Path


def make_trap(stores: dict[str, Path], kind: str, place: Path) -> Made:
    """A whole store but for one thing, in a folder of its own."""
    name = "csr" if kind in TRAPS else "zarr2"
    path = _copied(stores[name], place)
    if name == "csr":
        with h5py.File(path, "r+") as file:
            TRAPS[kind](file)
    else:
        ZARR_TRAPS[kind](path)
    return Made(path, kind, trap=True, original=stores[name])


def make_damage(stores: dict[str, Path], rng: np.random.Generator, place: Path) -> Made:
    """A store with random damage, in a folder of its own."""
    name = str(rng.choice(list(stores)))
    path = _copied(stores[name], place)
    kind = spoil(path, rng)
    return Made(path, f"{kind} in {name}", trap=False, original=stores[name])


def _copied(store: Path, place: Path) -> Path:
    place.mkdir()
    path = place / store.name
    if store.is_dir():
        shutil.copytree(store, path)
    else:
        shutil.copyfile(store, path)
    return path


def entries(path: Path, reader: StoreReader) -> Entries:
    """All that is taken of a store."""
    source = open_source(path, reader)
    spool = Spool()
    take_in(source, Vocabulary(tuple(f"GENE{i}" for i in range(GENES))), GENES, spool)
    reader.labels(path, "cell_type")
    return spool.finish()


def outcome(made: Made, reader: StoreReader, expected: Entries) -> str:
    """What becomes of a store: refused, harmless or silent; checks all that must hold of it."""
    out = made.path.parent.parent / f"out{made.path.suffix}"
    began = time.perf_counter()
    try:
        got = entries(made.path, reader)
        with written(out) as temporary:
            (shutil.copytree if made.path.is_dir() else shutil.copyfile)(made.path, temporary)
            embedding = np.zeros((CELLS, 2), np.float32)
            reader.add_to_obsm(temporary, "X_sigjax", embedding, made.path)
    except InputError as error:
        check_message(str(error), made)
        if out.exists():
            fail(made, "left a half-written output")
        result = "refused"
    else:
        same = all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))
        result = "harmless" if same else "silent"
        (shutil.rmtree if out.is_dir() else os.remove)(out)
    if time.perf_counter() - began > 2 * SECONDS:
        fail(made, "took too long")
    if made.trap and result != "refused":
        fail(made, f"was not refused but {result}")
    return result


def check_message(text: str, made: Made) -> None:
    """An error names the file, then a field, then what to do."""
    rest = text.partition(f"{made.path.name}: ")[2] or text.partition(f"{made.path.name}/")[2]
    if not rest or not rest.partition("; ")[2]:
        fail(made, f"has an error without file, field or remedy: {text}")


def fail(made: Made, why: str) -> None:
    """Raises AssertionError that says which store it was."""
    msg = f"{made.kind}: {why}"
    raise AssertionError(msg)


def caught_by_manifest(made: Made, manifest: Path) -> bool:
    """Whether the digest of the whole store tells that this one is not it."""
    digests = {
        made.path.parent.resolve() / file.relative_to(made.original.parent.resolve()): digest
        for file, digest in read_manifest(manifest).items()
        if file.is_relative_to(made.original.parent.resolve())
    }
    try:
        verify(made.path, digests, manifest)
    except InputError:
        return True
    return False


def run(folder: Path, count: int, seed: int) -> dict[str, collections.Counter[str]]:
    """Makes and reads stores, every trap first; counts outcomes by kind.

    Raises:
        AssertionError: something that must hold of every malformed store does not hold of one.
    """
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    rng = np.random.default_rng(seed)
    stores = write_stores(folder)
    manifest = folder / "SHA256SUMS"
    write_manifest(stores.values(), manifest)
    traps = [*TRAPS, *ZARR_TRAPS][:count]
    place = folder / "malformed"
    with StoreReader(Limits(seconds=SECONDS)) as reader:
        expected = entries(stores["csr"], reader)
        for number in range(count):
            if number < len(traps):
                made = make_trap(stores, traps[number], place)
            else:
                made = make_damage(stores, rng, place)
            counts[made.kind][outcome(made, reader, expected)] += 1
            if not made.trap and not caught_by_manifest(made, manifest):
                fail(made, "was not caught by its manifest")
            shutil.rmtree(place)
            if number % 100 == 99:
                sys.stderr.write(f"{number + 1} of {count}\n")
    return counts


def main() -> None:
    """Runs from the command line and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        counts = run(Path(folder), arguments.count, arguments.seed)
    total: collections.Counter[str] = collections.Counter()
    for kind, found in sorted(counts.items()):
        total += found
        sys.stdout.write(f"{kind:40s} {dict(found)}\n")
    seconds = time.perf_counter() - began
    sys.stdout.write(f"{total.total()} malformed stores: {dict(total)}, {seconds:.0f} s\n")


if __name__ == "__main__":
    main()
