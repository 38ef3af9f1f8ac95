"""sigjax doctor: what it says about every kind of host, and what it finds on this one."""

import dataclasses
import doctest
import logging
import os
import stat
import subprocess
import sys
import tomllib
from importlib.machinery import ModuleSpec
from pathlib import Path

import jax
import pytest

from sigjax import doctor, facts
from sigjax.choice import host_refusal
from sigjax.doctor import Report, diagnose
from sigjax.facts import Device, Facts, Ptxas

ROOT = Path(__file__).parents[1]
VERSIONS: dict[str, str | None] = {
    "sigjax": "0.1.0",
    "jax": "0.11.2",
    "jaxlib": "0.11.2",
    "jax-cuda13-plugin": None,
    "jax-cuda12-plugin": None,
    "jax-triton": "0.4.1",
    "triton": "3.9.0",
}
CUDA = VERSIONS | {"jax-cuda13-plugin": "0.11.2"}
CPU = Device("cpu", "cpu")
H100 = Device("gpu", "NVIDIA H100", 90)
NO_GPU = "jax sees no NVIDIA GPU here"
GPU_HOST = Facts(
    CUDA, (H100,), has_driver=True, xla_ptxas=Ptxas("/p/ptxas", (13, 0)), ptx_version=87
)


def change(**changes) -> Facts:
    return dataclasses.replace(GPU_HOST, **changes)


def test_on_a_gpu_host_with_everything_there_is_nothing_to_say():
    found = Report(GPU_HOST, tuple(diagnose(GPU_HOST)))
    assert found.findings == ()
    assert found.runs_triton
    assert "The Triton path runs here." in str(found)
    assert "NVIDIA H100 (gpu, capability 9.0)" in str(found)
    assert "CUDA 13.0, /p/ptxas" in str(found)
    assert "8.7" in str(found)


HOSTS = {
    "cpu_only": (
        Facts(VERSIONS, (CPU,), NO_GPU),
        False,
        "there is no NVIDIA GPU",
        'pip install "sigjax[cuda]"',
    ),
    "gpu_but_jax_without_cuda": (
        Facts(VERSIONS, (CPU,), NO_GPU, has_driver=True),
        True,
        "NVIDIA's driver is installed, but this jax has no CUDA",
        'pip install "sigjax[cuda]"',
    ),
    "broken_cuda_backend": (
        Facts(CUDA, (CPU,), NO_GPU, ("Unable to load cuDNN.",), has_driver=True),
        True,
        "jax-cuda13-plugin is installed but jax found no GPU: Unable to load cuDNN.",
        "see that nvidia-smi lists the GPU",
    ),
    "cuda_plugin_for_compile_tests": (
        Facts(CUDA, (CPU,), NO_GPU),
        False,
        "jax-cuda13-plugin is installed but jax found no GPU: it gave no reason",
        "on a GPU host, pip install",
    ),
    "kept_off_gpus": (
        Facts(CUDA, (CPU,), NO_GPU, jax_platforms="cpu", has_driver=True),
        False,
        "JAX_PLATFORMS=cpu keeps jax off GPUs",
        "unset JAX_PLATFORMS",
    ),
    "jax_could_not_start": (
        Facts(CUDA, (), "jax could not start", ("no cuda",), jax_platforms="cuda"),
        True,
        "jax could not start: no cuda",
        "unset JAX_PLATFORMS",
    ),
    "jax_could_not_start_without_a_word": (
        Facts(CUDA, (), "jax could not start", jax_platforms="cuda"),
        True,
        "jax could not start: it gave no reason",
        "unset JAX_PLATFORMS",
    ),
    "old_gpu": (
        change(devices=(Device("gpu", "Tesla T4", 75),), refusal="it needs 8.0"),
        False,
        "Tesla T4 has compute capability 7.5",
        "Ampere (8.0)",
    ),
    "gpu_of_another_maker": (
        change(devices=(Device("gpu", "MI300X"),), refusal=NO_GPU),
        False,
        "MI300X is no NVIDIA GPU",
        "Ampere (8.0)",
    ),
    "jax_too_new": (
        change(versions=CUDA | {"jax": "0.12.0"}),
        True,
        "jax 0.12.0 is not jax>=0.11.1,<0.12",
        'pip install "jax>=0.11.1,<0.12"',
    ),
    "jax_too_old": (
        change(versions=CUDA | {"jax": "0.11.0"}),
        True,
        "jax 0.11.0 is not jax>=0.11.1,<0.12",
        'pip install "jax>=0.11.1,<0.12"',
    ),
    "triton_too_old": (
        change(versions=CUDA | {"triton": "3.6.1"}),
        True,
        "triton 3.6.1 is not triton>=3.7",
        'pip install "triton>=3.7"',
    ),
    "jax_triton_too_old": (
        change(versions=CUDA | {"jax-triton": "0.3.0"}),
        True,
        "jax-triton 0.3.0 is not jax-triton>=0.4.1",
        'pip install "jax-triton>=0.4.1"',
    ),
    "jax_triton_missing": (
        change(versions=CUDA | {"jax-triton": None}, refusal="jax-triton is not installed"),
        True,
        "jax-triton is not installed",
        'pip install "jax-triton>=0.4.1"',
    ),
    "plugin_of_another_jaxlib": (
        change(versions=CUDA | {"jax-cuda13-plugin": "0.11.1"}),
        True,
        "jax-cuda13-plugin 0.11.1 does not match jaxlib 0.11.2",
        "pip install jax-cuda13-plugin==0.11.2",
    ),
    "no_ptxas": (
        change(xla_ptxas=None),
        False,
        "no ptxas was found",
        'pip install "sigjax[cuda]"',
    ),
    "old_ptxas": (
        change(xla_ptxas=Ptxas("/p/ptxas", (12, 6))),
        True,
        "the ptxas of XLA is of CUDA 12.6, the kernels need 12.8",
        'pip install "sigjax[cuda]"',
    ),
}


@pytest.mark.parametrize(("host", "is_problem", "what", "remedy"), HOSTS.values(), ids=HOSTS.keys())
def test_each_kind_of_host_is_told_what_is_wrong_and_what_to_do(host, is_problem, what, remedy):
    (finding,) = diagnose(host)
    assert what in finding.what
    assert remedy in finding.remedy
    assert finding.is_problem == is_problem
    found = Report(host, (finding,))
    assert found.is_healthy != is_problem
    assert f"{'problem' if is_problem else 'note'}: {finding.what}" in str(found)


def test_several_faults_are_all_told():
    host = change(versions=CUDA | {"jax": "0.12.1", "triton": None}, xla_ptxas=None)
    assert [finding.is_problem for finding in diagnose(host)] == [True, True, False]


@pytest.mark.parametrize(
    "host",
    [
        pytest.param(change(xla_ptxas=Ptxas("/p/ptxas", None)), id="ptxas_that_gives_no_release"),
        pytest.param(change(ptx_version=200), id="unknown_ptx_version"),
        pytest.param(change(ptx_version=None), id="no_ptx_version"),
        pytest.param(
            Facts(VERSIONS, (CPU,), NO_GPU, jax_platforms="cpu"), id="cpu_host_that_asks_for_cpu"
        ),
    ],
)
def test_nothing_is_claimed_where_nothing_is_known(host):
    assert diagnose(host) == []


def test_a_missing_package_does_not_matter_where_there_is_no_gpu():
    host = Facts(VERSIONS | {"triton": None}, (CPU,), NO_GPU)
    assert Report(host, tuple(diagnose(host))).is_healthy


def test_the_text_says_why_the_triton_path_does_not_run():
    text = str(Report(Facts(VERSIONS, (CPU,), NO_GPU), ()))
    assert f"The Triton path does not run here: {NO_GPU}." in text
    assert 'Calls take implementation "xla" instead' in text
    assert "ptxas of XLA" in text
    assert "not found" in text
    assert "jax-cuda12-plugin" not in text


def test_the_text_of_a_jax_that_could_not_start_promises_nothing():
    text = str(Report(HOSTS["jax_could_not_start"][0], ()))
    assert "none: jax could not start" in text
    assert '"xla"' not in text


def test_a_broken_host_is_not_said_to_run_triton():
    host = HOSTS["jax_too_new"][0]
    found = Report(host, tuple(diagnose(host)))
    assert not found.runs_triton
    assert "does not run here: see below." in str(found)


def test_the_required_versions_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {entry.split(";")[0].strip() for entry in project["dependencies"]}
    for name, least, too_new in doctor.REQUIRED:
        below = f",<{'.'.join(map(str, too_new))}" if too_new else ""
        assert f"{name}>={'.'.join(map(str, least))}{below}" in declared


def test_it_decides_as_the_op_does():
    found = doctor.report()
    assert found.facts.refusal == host_refusal()
    assert len(found.facts.devices) == len(jax.devices())
    assert found.facts.versions["jax"] == jax.__version__


def test_the_command_prints_the_report_and_succeeds_on_a_healthy_host():
    done = subprocess.run(
        [sys.executable, "-m", "sigjax.doctor"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sigjax doctor\n")
    assert "The Triton path does not run here" in done.stdout
    assert done.stderr == ""


def test_a_jax_that_cannot_start_is_reported_rather_than_raised():
    done = subprocess.run(
        [sys.executable, "-m", "sigjax.doctor"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "no_such_platform"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "problem: jax could not start" in done.stdout
    assert "no_such_platform" in done.stdout


def test_the_exit_status_tells_a_broken_host(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "gather", lambda: HOSTS["old_ptxas"][0])
    assert doctor.main([]) == 1
    assert "the kernels need 12.8" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "gather", lambda: GPU_HOST)
    assert doctor.main([]) == 0


def test_what_jax_logs_while_it_starts_is_kept(monkeypatch):
    def start():
        try:
            msg = "cuDNN not found"
            raise RuntimeError(msg)
        except RuntimeError:
            logging.getLogger("jax._src.xla_bridge").exception("plugin error")
        return []

    monkeypatch.setattr(jax, "devices", start)
    assert facts._devices() == ((), ("plugin error: cuDNN not found",))


@pytest.mark.parametrize(
    ("said", "release"), [("release 12.9, V12.9.86", (12, 9)), ("nothing", None)]
)
def test_a_ptxas_is_asked_for_its_release(tmp_path, said, release):
    tool = tmp_path / "ptxas"
    tool.write_text(f"#!/bin/sh\necho {said}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    assert facts._ptxas([tmp_path / "none", tmp_path]) == Ptxas(str(tool), release)
    assert facts._ptxas([tmp_path / "none"]) is None


def test_xlas_flag_comes_before_wheels_and_path(monkeypatch, tmp_path):
    specs = {"nvidia": ["/n"], "nvidia.cu13": ["/n/cu13"]}

    def find_spec(name):
        if name not in specs:
            return None
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = specs[name]
        return spec

    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1 --xla_gpu_cuda_data_dir=/cuda --xla_b=2")
    monkeypatch.setattr(facts.importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(facts.shutil, "which", lambda _: "/somewhere/bin/ptxas")
    folders = [str(folder) for folder in facts._xla_ptxas_folders()]
    assert folders == ["/cuda/bin", "/n/cu13/bin", "/somewhere/bin", "/usr/local/cuda/bin"]


def test_without_jax_triton_there_is_no_ptx_version(monkeypatch):
    monkeypatch.setattr(facts.importlib.util, "find_spec", lambda _: None)
    assert facts._ptx_version() is None


def test_a_package_that_is_not_installed_has_no_version():
    assert facts._version_of("no-such-package-as-this") is None


@pytest.mark.parametrize(
    ("reported", "capability"), [("9.0", 90), ("8.6", 86), ("gfx942", None), ("", None)]
)
def test_a_compute_capability_is_a_number_or_none(reported, capability):
    class Chip:
        compute_capability = reported

    assert facts._capability(Chip()) == capability  # pyrefly: ignore[bad-argument-type]


def test_the_documented_example_runs():
    result = doctest.testmod(doctor)
    assert (result.attempted > 0, result.failed) == (True, 0)
