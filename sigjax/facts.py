"""What this host has: packages, devices and PTX assemblers, as one frozen dataclass."""

import importlib.metadata
import importlib.util
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path

import jax

from sigjax.choice import host_refusal

PACKAGES = (
    "sigjax",
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
    "jax-triton",
    "triton",
    "flax",
    "optax",
    "orbax-checkpoint",
)
CUDA_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")

type Version = tuple[int, ...]


@dataclass(frozen=True)
class Device:
    """A device that jax found.

    Attributes:
        platform: "cpu", "gpu" or another of jax's names.
        kind: the maker's name of it.
        capability: compute capability, 90 for an H100; None where it has none.
    """

    platform: str
    kind: str
    capability: int | None = None


@dataclass(frozen=True)
class Ptxas:
    """An assembler of PTX: where it lies and the CUDA release it is of, None if it did not say."""

    path: str
    release: Version | None


@dataclass(frozen=True)
class Facts:
    """What was found on this host.

    Attributes:
        versions: version of each of PACKAGES; None where it is not installed.
        devices: what jax computes on, empty where it could not start.
        refusal: why the op would not take the Triton path here; None where it would.
        messages: what jax said while it looked for devices.
        jax_platforms: the value of JAX_PLATFORMS, or None.
        has_driver: whether NVIDIA's driver is installed.
        xla_ptxas: the assembler that XLA takes, or None.
        triton_ptxas: the assembler inside Triton, which sigjax does not use, or None.
        ptx_version: PTX version of the kernels, 87 for 8.7; None without jax-triton.
    """

    versions: Mapping[str, str | None]
    devices: tuple[Device, ...] = ()
    refusal: str | None = None
    messages: tuple[str, ...] = ()
    jax_platforms: str | None = None
    has_driver: bool = False
    xla_ptxas: Ptxas | None = None
    triton_ptxas: Ptxas | None = None
    ptx_version: int | None = None

    @property
    def gpus(self) -> tuple[Device, ...]:
        """The devices that are GPUs of any maker."""
        return tuple(device for device in self.devices if device.platform == "gpu")


def gather() -> Facts:
    """Asks the installed packages, jax and the file system; starts jax's backends."""
    devices, messages = _devices()
    spec = importlib.util.find_spec("triton")
    inside_triton = [Path(p) / "backends/nvidia/bin" for p in _locations(spec)]
    return Facts(
        versions={name: _version_of(name) for name in PACKAGES},
        devices=devices,
        refusal=host_refusal() if devices else "jax could not start",
        messages=messages,
        jax_platforms=jax.config.jax_platforms or None,
        has_driver=shutil.which("nvidia-smi") is not None,
        xla_ptxas=_ptxas(_xla_ptxas_folders()),
        triton_ptxas=_ptxas(inside_triton),
        ptx_version=_ptx_version(),
    )


class _Messages(logging.Handler):
    """Keeps what is logged, exceptions by their text, in place of printing it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1]:
            text = f"{text}: {record.exc_info[1]}"
        self.texts.append(text)


def _devices() -> tuple[tuple[Device, ...], tuple[str, ...]]:
    """The devices, and what jax logged or raised: it logs why a GPU backend is left out."""
    handler, logger = _Messages(), logging.getLogger("jax")
    logger.addHandler(handler)
    found: list[jax.Device] = []
    try:
        found = jax.devices()
    except (RuntimeError, AssertionError) as error:  # jax asserts that some platform started
        handler.texts += [str(error)] if str(error) else []
    finally:
        logger.removeHandler(handler)
    devices = tuple(Device(d.platform, d.device_kind, _capability(d)) for d in found)
    return devices, tuple(handler.texts)


def _capability(device: jax.Device) -> int | None:
    digits = str(getattr(device, "compute_capability", "")).replace(".", "")
    return int(digits) if digits.isdigit() else None  # AMD devices answer gfx...


def _xla_ptxas_folders() -> list[Path]:
    """Where XLA looks, in its order: its flag, NVIDIA's wheels, the path, the usual place."""
    flag = re.search(r"--xla_gpu_cuda_data_dir=(\S+)", os.environ.get("XLA_FLAGS", ""))
    roots = [Path(flag[1])] if flag else []
    for wheel in ("nvidia.cu13", "nvidia.cuda_nvcc"):
        if importlib.util.find_spec("nvidia") is not None:
            roots += [Path(p) for p in _locations(importlib.util.find_spec(wheel))]
    on_path = shutil.which("ptxas")
    folders = [root / "bin" for root in roots] + ([Path(on_path).parent] if on_path else [])
    return [*folders, Path("/usr/local/cuda/bin")]


def _locations(spec: ModuleSpec | None) -> list[str]:
    return list(spec.submodule_search_locations or []) if spec is not None else []


def _ptxas(folders: Sequence[Path]) -> Ptxas | None:
    path = next((f / "ptxas" for f in folders if os.access(f / "ptxas", os.X_OK)), None)
    if path is None:
        return None
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    return Ptxas(str(path), (int(release[1]), int(release[2])) if release else None)


def _ptx_version() -> int | None:
    if importlib.util.find_spec("jax_triton") is None or importlib.util.find_spec("triton") is None:
        return None
    from sigjax.kernels.launch import PTX_VERSION

    return PTX_VERSION


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
