"""Which implementation serves a call, and why the faster one does not."""

import contextlib
import contextvars
import importlib.metadata
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from sigjax.operands import Operands, Settings

type Implementation = Literal["triton", "xla", "auto"]

MIN_CAPABILITY = 80
HEAD_SIZES = (16, 256)

_target: contextvars.ContextVar[int | None] = contextvars.ContextVar("target", default=None)


@contextlib.contextmanager
def compile_for(capability: int) -> Iterator[None]:
    """Traces calls inside for a GPU that this host does not have, 90 for an H100.

    For lowering and exporting on a host without a GPU. What is traced inside must
    not be run here, and a function jitted before must not be reused inside.

    Example:
        >>> import jax, jax.numpy as jnp, sigjax
        >>> from sigjax.choice import compile_for
        >>> x = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
        >>> with compile_for(90):
        ...     traced = jax.jit(sigjax.sigmoid_attention).trace(x, x, x)
    """
    token = _target.set(capability)
    try:
        yield
    finally:
        _target.reset(token)


def gpu_capability() -> int | None:
    """Compute capability to compile for, 90 for an H100; None where there is no NVIDIA GPU."""
    if (target := _target.get()) is not None:
        return target
    if jax.default_backend() != "gpu":
        return None
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    digits = capability.replace(".", "")
    return int(digits) if digits.isdigit() else None  # AMD devices answer gfx...


def host_refusal() -> str | None:
    """Why the Triton path cannot run on this host, with the remedy; None where it can."""
    capability = gpu_capability()
    if capability is None:
        return 'jax sees no NVIDIA GPU here (on a GPU host: pip install "sigjax[cuda]")'
    if capability < MIN_CAPABILITY:
        return f"it needs compute capability 8.0 or newer, this GPU has {capability / 10}"
    for package in ("jax-triton", "triton"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"{package} is not installed (pip install {package})"
    return None


def call_refusal(operands: Operands, settings: Settings) -> str | None:
    """Why the Triton kernels cannot serve this call; None where they can."""
    head_size = operands.query.shape[-1]
    if not HEAD_SIZES[0] <= head_size <= HEAD_SIZES[1]:
        return f"it takes head sizes {HEAD_SIZES[0]} to {HEAD_SIZES[1]}, got {head_size}"
    if operands.query.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"it takes bfloat16, float16 and float32, got {operands.query.dtype}"
    return None


def choose(implementation: str | None, operands: Operands, settings: Settings) -> Implementation:
    """The implementation of a call; "auto" is Triton on a GPU, "xla" where XLA compiles for CPU.

    Raises:
        NotImplementedError: "triton" was asked for and cannot serve the call.
    """
    if implementation == "xla":
        return "xla"
    refusal = call_refusal(operands, settings) or host_refusal()
    if implementation == "triton":
        if refusal is not None:
            msg = (
                f"implementation 'triton' cannot serve this call: {refusal}; "
                "use implementation 'xla', or None to take it where 'triton' cannot"
            )
            raise NotImplementedError(msg)
        return "triton"
    return "xla" if refusal is not None else "auto"
