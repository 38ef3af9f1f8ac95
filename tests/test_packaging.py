"""The package as users get it: wheel, sdist, editable install, checkout, and who imports what."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Folder of the tree -> folder in the wheel.
PACKAGES = {"sigjax": "sigjax", "kernels": "sigjax/kernels", "models": "sigjax/models"}
DEVICE_MODULES = (
    "tile_math",
    "pairs",
    "forward",
    "backward",
    "bias_gradient",
    "hopper_forward",
    "hopper_keys",
    "hopper_logits",
    "hopper_matrix",
    "hopper_pairs",
    "hopper_queue",
    "hopper_tiles",
    "hopper_turns",
    "hopper_backward",
    "hopper_backward_pairs",
    "hopper_backward_matrix",
    "hopper_backward_step",
    "hopper_biases",
    "hopper_bias_gradient",
    "hopper_outputs",
    "hopper_sums",
    "query_sums",
    "hopper_weights",
    "hopper_math",
    "hopper_exchange",
)
LOCATIONS = """
import sigjax, sigjax.kernels.tiles, sigjax.models.config
for module in (sigjax, sigjax.kernels.tiles, sigjax.models.config):
    print(module.__file__)
"""


@dataclass(frozen=True)
class Distributions:
    """What is built from a copy of the tree."""

    tree: Path
    sdist: Path
    wheel: Path
    wheel_from_sdist: Path


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Runs a command without this process's PYTHONPATH; returns what it printed."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def modules_of_the_tree(root: Path) -> Iterator[tuple[str, bytes]]:
    """(path in the tree, content) of every module, each once: links are not followed."""
    for folder in PACKAGES:
        for path in sorted((root / folder).glob("*.py")):
            yield path.relative_to(root).as_posix(), path.read_bytes()


def content_of_wheel(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert len(names) == len(set(names))
        return {name: archive.read(name) for name in names}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """Built from a copy: setuptools leaves folders behind, and takes up what lies in them."""
    tree, out, unpacked = (tmp_path_factory.mktemp(name) for name in ("tree", "out", "unpacked"))
    for folder in PACKAGES:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, tree / folder, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tree / name)
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--sdist", "--outdir", out, tree, cwd=tree)
    run(*build, "--wheel", "--outdir", out, tree, cwd=tree)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    run(*build, "--wheel", "--outdir", unpacked, source, cwd=unpacked)
    (wheel_from_sdist,) = unpacked.glob("*.whl")
    return Distributions(tree, sdist, wheel, wheel_from_sdist)


def test_the_wheel_holds_every_module_of_the_tree_once_and_nothing_else(built):
    expected = {
        f"{PACKAGES[folder]}/{name}": content
        for path, content in modules_of_the_tree(ROOT)
        for folder, name in [path.split("/")]
    }
    held = content_of_wheel(built.wheel)
    packaged = {name: content for name, content in held.items() if ".dist-info/" not in name}
    assert packaged.pop("sigjax/py.typed") == b""
    assert packaged == expected


def test_the_sdist_holds_every_module_of_the_tree_once(built):
    with tarfile.open(built.sdist) as archive:
        members = [member for member in archive.getmembers() if not member.isdir()]
        assert all(member.isfile() for member in members), "an sdist with links does not unpack"
        paths = [member.name.split("/", 1)[1] for member in members]
    held = sorted(path for path in paths if path.endswith(".py") and path != "setup.py")
    tests = [path for path in held if path.startswith("tests/")]
    assert sorted(set(held) - set(tests)) == sorted(path for path, _ in modules_of_the_tree(ROOT))
    assert len(paths) == len(set(paths))


def test_a_wheel_built_from_the_sdist_is_the_wheel_of_the_tree(built):
    assert content_of_wheel(built.wheel_from_sdist) == content_of_wheel(built.wheel)


def test_an_installed_wheel_is_imported_from_an_empty_folder(built, tmp_path):
    target, empty = tmp_path / "target", tmp_path / "empty"
    empty.mkdir()
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", target, built.wheel, cwd=empty)
    printed = run(sys.executable, "-c", LOCATIONS, cwd=empty, PYTHONPATH=str(target))
    assert printed.split() == [
        str(target / "sigjax" / name)
        for name in ("__init__.py", "kernels/tiles.py", "models/config.py")
    ]


def test_an_editable_install_is_the_tree(built, tmp_path):
    environment, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    # The dependencies of this environment; its own editable installs do not come along.
    own = Path(
        run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=empty).strip()
    )
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index")
    run(*pip, "--no-deps", "--no-build-isolation", "--editable", built.tree, cwd=empty)

    printed = [Path(line).resolve() for line in run(python, "-c", LOCATIONS, cwd=empty).split()]
    assert printed == [
        built.tree.resolve() / name
        for name in ("sigjax/__init__.py", "kernels/tiles.py", "models/config.py")
    ]
    assert "doctor" in run(environment / "bin" / "sigjax", "--help", cwd=empty)


def test_a_plain_checkout_is_imported_from_its_root():
    printed = run(sys.executable, "-c", LOCATIONS, cwd=ROOT).split()
    assert [Path(line).resolve() for line in printed] == [
        ROOT / "sigjax/__init__.py",
        ROOT / "kernels/tiles.py",
        ROOT / "models/config.py",
    ]


def test_the_links_of_the_checkout_are_relative():
    assert (ROOT / "sigjax" / "kernels").readlink() == Path("../kernels")
    assert (ROOT / "sigjax" / "models").readlink() == Path("../models")


def test_importing_sigjax_imports_no_kernel_and_no_pipeline():
    code = "import sys, sigjax; print(*sys.modules)"
    loaded = set(run(sys.executable, "-c", code, cwd=ROOT).split())
    heavy = {"jax_triton", "triton", "sigjax.models", "sigjax.kernels.launch"}
    heavy |= {"anndata", "scanpy", "grain", "tyro", "matplotlib", "pandas"}
    assert "sigjax.attention" in loaded
    assert loaded & heavy == set()


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """(absolute module, level) of each import statement at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield module, node.level
            # "from sigjax import models" imports sigjax.models
            yield from ((f"{module}.{alias.name}", node.level) for alias in node.names)


def imports_package(path: Path, package: str) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for module, _ in imports_of(path))


@pytest.mark.parametrize(
    "path", [p for name in DEVICE_MODULES for p in [ROOT / f"kernels/{name}.py"] if p.exists()],
    ids=lambda path: path.stem,
)  # fmt: skip
def test_a_device_module_imports_triton_and_other_device_modules_only(path):
    # typing: for tuples whose members have names.
    allowed = ("triton", "typing", *(f"sigjax.kernels.{name}" for name in DEVICE_MODULES))
    foreign = [
        module
        for module, _ in imports_of(path)
        if not any(f"{module}.".startswith(f"{name}.") for name in allowed)
    ]
    assert foreign == []


def test_there_are_no_relative_imports():
    folders = ("sigjax", "kernels", "models", "benchmarks", "tests")
    paths = [path for folder in folders for path in (ROOT / folder).glob("*.py")]
    relative = [str(path) for path in paths for _, level in imports_of(path) if level > 0]
    assert len(paths) > 20
    assert relative == []


def test_only_the_launcher_calls_jax_triton():
    paths = [path for folder in PACKAGES for path in (ROOT / folder).glob("*.py")]
    importers = {path.name for path in paths if imports_package(path, "jax_triton")}
    assert "launch.py" in importers
    assert importers <= {
        "launch.py",
        "hopper_operands.py",
        "hopper_bias_launch.py",
        "hopper_matrices.py",
        "query_sums_launch.py",
        "jax_triton_compat.py",
        "kernel_cache.py",
    }


def test_the_op_knows_nothing_of_the_model():
    paths = [path for folder in ("sigjax", "kernels") for path in (ROOT / folder).glob("*.py")]
    assert [path.name for path in paths if imports_package(path, "sigjax.models")] == []


def test_the_constraints_pin_what_the_extras_ask_for():
    lines = (ROOT / "constraints.txt").read_text().split("\n")
    pinned = dict(line.split("==") for line in lines if line)
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in lines if line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["cells"], *extras["test"]]
    names = {re.split(r"[^A-Za-z0-9-]", entry)[0] for entry in wanted}
    assert names - set(pinned) == set()
    assert pinned["jax-cuda13-plugin"] == pinned["jax"] == pinned["jaxlib"]
