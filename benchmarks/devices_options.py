"""The command line of benchmarks.devices, and the environment that jax has to find."""

import argparse
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PARTS = ("op", "train", "context")
SIMULATED = "--xla_force_host_platform_device_count"


class UsageError(ValueError):
    """What was asked for cannot be measured here; the text says why."""


@dataclass(frozen=True)
class Options:
    """What to measure and where results go.

    Attributes:
        out: folder of the results.
        devices: numbers of devices, 1 among them; None is every power of two that there is.
        parts: of PARTS.
        time_budget_s: no cell starts that would end later; None has no end.
        commit: recorded where there is no git; None asks git.
        small: tiny sizes on simulated devices.
    """

    out: Path
    devices: tuple[int, ...] | None
    parts: tuple[str, ...]
    time_budget_s: float | None
    commit: str | None
    small: bool


def prepare_environment(environment: MutableMapping[str, str], *, small: bool) -> None:
    """What jax and NCCL have to find; what the user set stays, but for small's platform."""
    # Multicast over NVLink needs a fabric manager that not every host offers.
    environment.setdefault("NCCL_NVLS_ENABLE", "0")
    if small:
        environment["JAX_PLATFORMS"] = "cpu"
        # Tiny programs take longer to compile than to run.
        environment.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        flags = environment.get("XLA_FLAGS", "")
        if SIMULATED not in flags:
            environment["XLA_FLAGS"] = f"{flags} {SIMULATED}=8".strip()


def parse(argv: Sequence[str], description: str) -> Options:
    """Reads a command line; ends the process with status 2 where it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.devices",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--devices", type=_counts, help="1,2,...; default: powers of two")
    parser.add_argument("--parts", type=_parts, default=PARTS, help=f"of {','.join(PARTS)}")
    parser.add_argument("--time-budget-s", type=_seconds, help="start no cell that would end later")
    parser.add_argument("--commit", help="commit to record where there is no git")
    parser.add_argument("--small", action="store_true", help="tiny sizes on simulated devices")
    return Options(**vars(parser.parse_args(argv)))


def _counts(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts) or min(map(int, parts)) != 1:
        msg = f"expected numbers of devices from 1 on, 1 among them, got {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return tuple(sorted({int(part) for part in parts}))


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(dict.fromkeys(text.split(",")))
    if unknown := [part for part in parts if part not in PARTS]:
        msg = f"expected some of {','.join(PARTS)}, got {','.join(unknown)}"
        raise argparse.ArgumentTypeError(msg)
    return parts


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        msg = f"expected a number of seconds, got {text!r}"
        raise argparse.ArgumentTypeError(msg) from None
    if not seconds > 0:
        msg = f"expected seconds above 0, got {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return seconds
