"""Malformed stores are refused, and never crash, hang or leave half an output."""

import collections
from pathlib import Path

import pytest

from sigjax.models.config import InputError
from sigjax.models.store_limits import Limits
from sigjax.models.store_reader import StoreReader, check_kind, is_hdf5
from tests import malformed

# Few, for the time it takes; `python tests/malformed.py` makes 2,000 with the traps.
DAMAGED = 40


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, Path]:
    return malformed.write_stores(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def reader():
    with StoreReader(Limits(seconds=malformed.SECONDS)) as opened:
        yield opened


@pytest.fixture(scope="module")
def expected(stores, reader) -> malformed.Entries:
    return malformed.entries(stores["csr"], reader)


@pytest.mark.parametrize("name", ["csr", "gzip", "csc", "dense", "zarr2", "zarr3"])
def test_the_whole_stores_hold_the_same_cells(stores, reader, expected, name: str):
    made = malformed.Made(stores[name], "nothing", trap=False, original=stores[name])
    assert malformed.outcome(made, reader, expected) == "harmless"


@pytest.mark.parametrize("kind", [*malformed.TRAPS, *malformed.ZARR_TRAPS])
def test_a_trap_is_refused_by_file_field_and_remedy(stores, reader, expected, tmp_path, kind: str):
    made = malformed.make_trap(stores, kind, tmp_path / "malformed")
    assert malformed.outcome(made, reader, expected) == "refused"


def test_random_damage_is_refused_harmless_or_caught_by_a_manifest(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(malformed, "TRAPS", {})
    monkeypatch.setattr(malformed, "ZARR_TRAPS", {})
    counts = malformed.run(tmp_path, DAMAGED, seed=3)
    total = sum(counts.values(), collections.Counter())
    assert total.total() == DAMAGED
    assert total["refused"] > DAMAGED / 4
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"SHA256SUMS", *(f"{n}.h5ad" for n in ("csr", "gzip", "csc", "dense"))} | {
        "zarr2.zarr",
        "zarr3.zarr",
    }


def test_a_file_is_known_by_its_first_bytes(tmp_path: Path, stores):
    blocked = tmp_path / "blocked.h5ad"
    blocked.write_bytes(bytes(1024) + stores["csr"].read_bytes())
    assert is_hdf5(blocked)
    (tmp_path / "text.h5ad").write_text("gene,cell")
    (tmp_path / "empty.h5ad").touch()
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("text.h5ad", r"text.h5ad: not an .h5ad file \(no HDF5\); write one"),
        ("empty.h5ad", r"empty.h5ad: not an .h5ad file"),
        ("folder", r"folder: not a zarr store \(no .zgroup or zarr.json\); give"),
        ("nowhere", r"nowhere: no such file; give the path"),
    ):
        with pytest.raises(InputError, match=message):
            check_kind(tmp_path / name)
