"""What this host offers sigjax, whether the Triton path can run, and if not what to do."""

import argparse
import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sigjax.choice import MIN_CAPABILITY
from sigjax.facts import CUDA_PLUGINS, Device, Facts, Ptxas, Version, gather

# As in pyproject.toml: (package, least version, first version that is too new).
REQUIRED = (
    ("jax", (0, 11, 1), (0, 12)),
    ("jax-triton", (0, 4, 1), None),
    ("triton", (3, 7), None),
)
# The CUDA release whose ptxas first takes a PTX version.
CUDA_OF_PTX = {85: (12, 5), 86: (12, 7), 87: (12, 8), 88: (12, 9), 90: (13, 0), 91: (13, 1)}


@dataclass(frozen=True)
class Finding:
    """One thing to know about the host.

    Attributes:
        what: what was found.
        remedy: what to do about it.
        is_problem: whether it is broken, rather than only absent.
    """

    what: str
    remedy: str
    is_problem: bool


@dataclass(frozen=True)
class Report:
    """The facts and what follows from them."""

    facts: Facts
    findings: tuple[Finding, ...]

    @property
    def is_healthy(self) -> bool:
        """Whether nothing is broken; a host without a GPU is healthy."""
        return not any(finding.is_problem for finding in self.findings)

    @property
    def runs_triton(self) -> bool:
        """Whether calls of the op take the Triton path here."""
        return self.facts.refusal is None and self.is_healthy

    def __str__(self) -> str:
        """The report as a table of plain text."""
        rows = list(_rows(self.facts))
        width = max(len(name) for name, _ in rows) + 2
        lines = ["sigjax doctor", *(f"  {name:<{width}}{value}" for name, value in rows), ""]
        if self.runs_triton:
            lines.append("The Triton path runs here.")
        else:
            reason = self.facts.refusal or "see below"
            lines.append(f"The Triton path does not run here: {reason}.")
            if self.facts.devices:
                lines.append('Calls take implementation "xla" instead, on any device.')
        for finding in self.findings:
            mark = "problem" if finding.is_problem else "note"
            lines += [f"  {mark}: {finding.what}", f"    -> {finding.remedy}"]
        return "\n".join(lines)


def report() -> Report:
    """Looks at this host.

    Example:
        >>> from sigjax import doctor
        >>> doctor.report().facts.versions["triton"] is not None
        True
    """
    facts = gather()
    return Report(facts, tuple(diagnose(facts)))


def diagnose(facts: Facts) -> list[Finding]:
    """Everything that keeps calls off the Triton path or would break them, with remedies."""
    return [*_device_findings(facts), *_version_findings(facts), *_ptxas_findings(facts)]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; the exit status is 1 where something is broken."""
    parser = argparse.ArgumentParser(prog="sigjax doctor", description=__doc__)
    parser.parse_args(argv)
    found = report()
    print(found)
    return 0 if found.is_healthy else 1


def _rows(facts: Facts) -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    for name, version in facts.versions.items():
        if version is not None or name not in CUDA_PLUGINS:
            yield name, version or "not installed"
    if not facts.devices:
        yield "devices", "none: jax could not start"
    for index, device in enumerate(facts.devices):
        capability = (
            "" if device.capability is None else f", capability {device.capability / 10:.1f}"
        )
        yield f"device {index}", f"{device.kind} ({device.platform}{capability})"
    yield "ptxas of XLA", _described(facts.xla_ptxas)
    yield "ptxas of Triton", _described(facts.triton_ptxas)
    yield "PTX of kernels", "none" if facts.ptx_version is None else f"{facts.ptx_version / 10:.1f}"


def _described(ptxas: Ptxas | None) -> str:
    if ptxas is None:
        return "not found"
    release = "unknown release" if ptxas.release is None else f"CUDA {_dotted(ptxas.release)}"
    return f"{release}, {ptxas.path}"


def _device_findings(facts: Facts) -> Iterator[Finding]:
    said = "; ".join(facts.messages)
    install = 'pip install "sigjax[cuda]" in this environment'
    plugin = next((p for p in CUDA_PLUGINS if facts.versions.get(p) is not None), None)
    platforms = facts.jax_platforms
    if not facts.devices:
        remedy = f"unset JAX_PLATFORMS, or {install} and see that nvidia-smi lists the GPU"
        yield _problem(f"jax could not start: {said or 'it gave no reason'}", remedy)
    elif facts.gpus:
        yield from _gpu_findings(facts.gpus)
    elif platforms is not None and not {"cuda", "gpu"} & set(platforms.split(",")):
        if facts.has_driver or plugin is not None:
            what = f"JAX_PLATFORMS={platforms} keeps jax off GPUs"
            yield _note(what, "unset JAX_PLATFORMS where a GPU is to be used")
    elif plugin is not None:
        what = f"{plugin} is installed but jax found no GPU: {said or 'it gave no reason'}"
        remedy = f"on a GPU host, {install} and see that nvidia-smi lists the GPU"
        yield Finding(what, remedy, facts.has_driver)
    elif facts.has_driver:
        what = "NVIDIA's driver is installed, but this jax has no CUDA"
        yield _problem(what, install)
    else:
        yield _note("there is no NVIDIA GPU", f"none needed; on a GPU host, {install}")


def _gpu_findings(gpus: Sequence[Device]) -> Iterator[Finding]:
    for gpu in gpus:
        if gpu.capability is None:
            what = f"{gpu.kind} is no NVIDIA GPU"
        elif gpu.capability < MIN_CAPABILITY:
            what = f"{gpu.kind} has compute capability {gpu.capability / 10:.1f}"
        else:
            continue
        yield _note(what, "for the kernels, an NVIDIA GPU from Ampere (8.0) on")


def _version_findings(facts: Facts) -> Iterator[Finding]:
    for name, least, too_new in REQUIRED:
        wanted = f"{name}>={_dotted(least)}" + (f",<{_dotted(too_new)}" if too_new else "")
        version = facts.versions.get(name)
        if version is None:
            yield Finding(
                f"{name} is not installed", f'pip install "{wanted}"', is_problem=bool(facts.gpus)
            )
        elif _parsed(version) < least or (too_new and _parsed(version) >= too_new):
            yield _problem(f"{name} {version} is not {wanted}", f'pip install "{wanted}"')
    jaxlib = facts.versions.get("jaxlib")
    for plugin in CUDA_PLUGINS:
        version = facts.versions.get(plugin)
        if version is not None and jaxlib is not None and _parsed(version) != _parsed(jaxlib):
            what = f"{plugin} {version} does not match jaxlib {jaxlib}"
            yield _problem(what, f"pip install {plugin}=={jaxlib}")


def _ptxas_findings(facts: Facts) -> Iterator[Finding]:
    if not any(gpu.capability for gpu in facts.gpus):
        return
    remedy = 'pip install "sigjax[cuda]" brings the ptxas that fits'
    if facts.xla_ptxas is None:
        yield _note("no ptxas was found, XLA must bring its own", remedy)
        return
    release, needed = facts.xla_ptxas.release, CUDA_OF_PTX.get(facts.ptx_version or 0)
    if release is not None and needed is not None and release < needed:
        what = f"the ptxas of XLA is of CUDA {_dotted(release)}, the kernels need "
        yield _problem(what + _dotted(needed), remedy)


def _problem(what: str, remedy: str) -> Finding:
    return Finding(what, remedy, is_problem=True)


def _note(what: str, remedy: str) -> Finding:
    return Finding(what, remedy, is_problem=False)


def _parsed(version: str) -> Version:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))


if __name__ == "__main__":
    raise SystemExit(main())
