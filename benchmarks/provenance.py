"""Where a result comes from: versions, commit, command."""

import importlib.metadata
import shlex
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.rows import Provenance

ROOT = Path(__file__).resolve().parent.parent
# Their values are places on one machine: no part of a command that another can run.
PATH_OPTIONS = ("--triton-sigmoid-path", "--worker-python")


def collect(
    *,
    card: str,
    driver: str,
    worker_versions: Mapping[str, str],
    argv: Sequence[str],
    commit: str | None = None,
    module: str = "benchmarks.attention",
) -> Provenance:
    """The provenance of a run that starts now.

    Args:
        card: name of the device.
        driver: its driver's version.
        worker_versions: torch, worker_triton and triton_sigmoid; empty without a worker.
        argv: the command line's arguments.
        commit: None asks git.
        module: what the command runs.
    """
    return Provenance(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        card=card,
        driver=driver,
        jax=version("jax"),
        jaxlib=version("jaxlib"),
        triton=version("triton"),
        jax_triton=version("jax-triton"),
        cudnn=version("nvidia-cudnn-cu13"),
        torch=worker_versions.get("torch", ""),
        worker_triton=worker_versions.get("worker_triton", ""),
        triton_sigmoid=worker_versions.get("triton_sigmoid", ""),
        sigjax=version("sigjax") or _checkout_version(),
        commit=commit or git_commit(),
        command=command(argv, module),
    )


def version(package: str) -> str:
    """Version of an installed package, "" where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def git_commit() -> str:
    """Short hash of the checkout, "+" behind it where files differ; "unknown" without git."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        # Results written by an earlier run are no change of what is measured.
        changed = _git("status", "--porcelain", "--", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed else "")


def command(argv: Sequence[str], module: str = "benchmarks.attention") -> str:
    """The command that repeats a run, without this machine's paths or output folder."""
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        option, joined, _ = word.partition("=")
        if option in ("--out", *PATH_OPTIONS):
            if not joined:
                next(words, None)
            if option != "--out":
                kept += [option, "PATH"]
        else:
            kept.append(word)
    return shlex.join(["python", "-m", module, *kept])


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _checkout_version() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
