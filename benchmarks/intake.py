"""Peak memory and time of taking in a large store: python benchmarks/intake.py FOLDER.

Makes FOLDER/large.h5ad where it is missing, outside the repository: a million cells of 20,000
genes, 500 of them expressed, 4 GB of csr. Then every cell is read, checked, normalised and kept
as training does, in a process of its own, and its peak memory and its reader's are printed.
"""

import argparse
import multiprocessing
import resource
import sys
import time
from pathlib import Path

import h5py
import numpy as np

from sigjax.models.config import DataConfig
from sigjax.models.corpus import read_cells

GENES = 20_000
BLOCK = 10_000


def make(path: Path, cells: int, expressed: int) -> None:
    """Writes a store of random counts block by block, as anndata would lay it out."""
    rng = np.random.default_rng(0)
    text = h5py.string_dtype()
    about = {"encoding-version": "0.2.0"}
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for frame, prefix, size in (("obs", "cell", cells), ("var", "GENE", GENES)):
            group = file.create_group(frame)
            group.attrs.update({"encoding-type": "dataframe", "_index": "_index", **about})
            group.attrs["column-order"] = np.array([], text)
            names = group.create_dataset(
                "_index", data=[f"{prefix}{i}" for i in range(size)], dtype=text
            )
            names.attrs.update({"encoding-type": "string-array", **about})
        matrix = file.create_group("X")
        matrix.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
        matrix.attrs["shape"] = [cells, GENES]
        matrix["indptr"] = np.arange(cells + 1, dtype=np.int64) * expressed
        chunks = (expressed * 1000,)
        data = matrix.create_dataset("data", (cells * expressed,), "f4", chunks=chunks)
        indices = matrix.create_dataset("indices", (cells * expressed,), "i4", chunks=chunks)
        # Steps of this size end before the last gene, so genes rise and none comes twice.
        widest = GENES // expressed
        for start in range(0, cells, BLOCK):
            shape = (min(BLOCK, cells - start), expressed)
            genes = np.cumsum(rng.integers(1, widest + 1, shape, np.int32), axis=1) - 1
            part = slice(start * expressed, start * expressed + genes.size)
            indices[part] = genes.ravel()
            data[part] = 1 + rng.geometric(0.5, genes.size).astype(np.float32)


def take_in(path: Path) -> None:
    """Reads the store and prints what that took."""
    began = time.perf_counter()
    cells, vocabulary = read_cells([path], DataConfig(max_genes=GENES), print)
    seconds = time.perf_counter() - began
    # Every page once, as training would.
    total = sum(
        float(cells.values[i : i + 10_000_000].sum(dtype=np.float64))
        for i in range(0, len(cells.values), 10_000_000)
    )
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reader = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    sys.stdout.write(
        f"{len(cells):,} cells, {len(cells.values):,} values, {len(vocabulary.genes):,} genes, "
        f"mean {total / len(cells.values):.4f}: {seconds:.0f} s; peak memory "
        f"{own / 2**20:.2f} GiB with the pages of mapped files, and {reader / 2**20:.2f} GiB of "
        "the reader\n"
    )


def main() -> None:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--expressed", type=int, default=500)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path = arguments.folder / "large.h5ad"
    if not path.exists():
        make(path, arguments.cells, arguments.expressed)
    # Apart from the process that made the store.
    process = multiprocessing.get_context("spawn").Process(target=take_in, args=(path,))
    process.start()
    process.join()
    sys.exit(process.exitcode)


if __name__ == "__main__":
    main()
