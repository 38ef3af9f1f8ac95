"""Digests notice every changed byte, and folders give their stores in order."""

import shutil
import subprocess
from pathlib import Path

import pytest

from sigjax.models import cli
from sigjax.models.config import InputError
from sigjax.models.manifest import digest, find_stores, read_manifest, verify, write_manifest


def store(folder: Path, name: str) -> Path:
    """Something that looks like a store; no test here reads it."""
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / name
    if path.suffix == ".zarr":
        (path / "X").mkdir(parents=True)
        (path / "zarr.json").write_text("{}")
        (path / "X/0").write_bytes(b"values")
    else:
        path.write_bytes(f"{name} has bytes".encode())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a file, a zarr store and a manifest of both."""
    data = tmp_path / "data"
    stores = [store(data, "a.h5ad"), store(data, "b.zarr")]
    assert write_manifest(stores, data / "SHA256SUMS") == 3
    return data


def check(folder: Path, name: str) -> None:
    manifest = folder / "SHA256SUMS"
    verify(folder / name, read_manifest(manifest), manifest)


def test_stores_that_did_not_change_pass(folder: Path, tmp_path: Path):
    moved = folder.rename(tmp_path / "moved")
    for name in ("a.h5ad", "b.zarr"):
        check(moved, name)
    assert len(read_manifest(moved / "SHA256SUMS")) == 3


@pytest.mark.parametrize("name", ["a.h5ad", "b.zarr/X/0", "b.zarr/zarr.json"])
def test_a_changed_byte_is_noticed(folder: Path, name: str):
    data = bytearray((folder / name).read_bytes())
    data[0] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(InputError, match=rf"{name}: its bytes are not those .* copy it again"):
        check(folder, name.split("/")[0])


def test_a_file_more_or_less_in_a_store_is_noticed(folder: Path):
    (folder / "b.zarr/X/1").write_bytes(b"more")
    with pytest.raises(InputError, match=r"b.zarr/X/1: not listed in .*SHA256SUMS; write"):
        check(folder, "b.zarr")
    (folder / "b.zarr/X/1").unlink()
    (folder / "b.zarr/X/0").unlink()
    with pytest.raises(InputError, match=r"b.zarr: 0 is listed in .* but gone; copy"):
        check(folder, "b.zarr")


def test_a_store_that_is_not_there_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"c.h5ad: no such file"):
        check(folder, "c.h5ad")
    with pytest.raises(InputError, match=r"c.h5ad: no such file"):
        write_manifest([folder / "c.h5ad"], tmp_path / "SUMS")
    assert not (tmp_path / "SUMS").exists()


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs coreutils' sha256sum")
def test_a_manifest_is_what_sha256sum_writes_and_checks(folder: Path):
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, capture_output=True
    )
    assert done.returncode == 0
    theirs = subprocess.run(["sha256sum", "a.h5ad"], cwd=folder, capture_output=True, text=True)
    (folder / "theirs").write_text(theirs.stdout)
    verify(folder / "a.h5ad", read_manifest(folder / "theirs"), folder / "theirs")
    assert theirs.stdout.startswith(digest(folder / "a.h5ad"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a.h5ad\n", r"SUMS: line 1 must be a SHA-256 digest, two spaces and a path"),
        (b"\xff\xfe", r"SUMS: must be text in UTF-8"),
    ],
    ids=["no digest", "no text"],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "SUMS"
    with pytest.raises(InputError, match=r"SUMS: no such manifest; sigjax manifest"):
        read_manifest(path)
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_manifest(path)


def test_folders_give_their_stores_by_name_and_then_those_one_level_down(tmp_path: Path):
    wanted = [
        store(tmp_path, "b.h5ad"),
        store(tmp_path, "c.zarr"),
        store(tmp_path / "a", "z.h5ad"),
        store(tmp_path / "d", "y.zarr"),
    ]
    deeper = store(tmp_path / "a/deeper", "x.h5ad")
    (tmp_path / "notes.txt").write_text("no store")
    assert find_stores([tmp_path]) == tuple(wanted)
    assert find_stores([wanted[1], tmp_path / "a"]) == (wanted[1], wanted[2], deeper)


def test_a_folder_without_stores_and_a_store_named_twice_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"no .h5ad file and no .zarr store in this folder"):
        find_stores([tmp_path])
    path = store(tmp_path, "a.h5ad")
    with pytest.raises(InputError, match=r"a.h5ad: named twice; .* name it once"):
        find_stores([tmp_path, path])


def test_the_command_writes_a_manifest(folder: Path, capsys):
    out = folder / "sums.txt"
    assert cli.main(["manifest", str(folder), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 3 files\n"
    assert out.read_text() == (folder / "SHA256SUMS").read_text()
