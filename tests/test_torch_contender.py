"""The worker process: its protocol, its errors and its environment."""

import sys

import pytest

from benchmarks.torch_contender import (
    SCRIPT,
    Prewarming,
    TorchContender,
    WorkerError,
    prewarm_jobs,
    worker_command,
    worker_environment,
)
from sigjax.testing import (
    WORKLOAD_NAMES,
    Workload,
    workload,
)
from tests.benchmark_parts import TINY, VERSIONS, fake_worker


def test_a_worker_answers_in_lock_step(tmp_path):
    with TorchContender(fake_worker(tmp_path)) as worker:
        assert worker.hello() is None
        assert worker.versions == VERSIONS
        worker.prepare(TINY, None, "backward")
        assert [worker.burst(calls) for calls in (1, 5)] == [0.032, 0.032]
        worker.release()


def test_an_error_of_the_worker_reaches_the_parent_and_the_worker_goes_on(tmp_path):
    with TorchContender(fake_worker(tmp_path)) as worker:
        with pytest.raises(WorkerError, match="triton_sigmoid: RuntimeError: out of memory"):
            worker.prepare(Workload("dense", 1, 13, 1, 16), None, "forward")
        worker.prepare(TINY, None, "forward")
        assert worker.burst(1) == 0.032


def test_an_unknown_request_is_an_error(tmp_path):
    with TorchContender(fake_worker(tmp_path)) as worker:
        worker.send(op="dance")
        with pytest.raises(WorkerError, match="op must be hello, prepare, burst or release"):
            worker.receive(20)


def test_a_worker_that_ends_is_an_error_with_its_last_words(tmp_path):
    with TorchContender(fake_worker(tmp_path)) as worker:
        with pytest.raises(WorkerError, match="the worker has ended: a last word"):
            worker.burst(99)
        with pytest.raises(WorkerError, match="the worker has ended"):
            worker.release()


def test_a_worker_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.torch_contender.BURST_TIMEOUT_S", 1.0)
    with TorchContender(fake_worker(tmp_path)) as worker:
        worker.hello()
        with pytest.raises(WorkerError, match="did not answer within 1 s"):
            worker.burst(98)


def test_the_real_worker_says_what_it_cannot_import():
    # -I -S: no site-packages, so no torch, whatever this machine has.
    with TorchContender([sys.executable, "-I", "-S", str(SCRIPT)]) as worker:
        reason = worker.hello()
    assert reason == "ModuleNotFoundError: No module named 'torch'"


def test_prewarming_serves_every_shape_and_reports_what_failed(tmp_path):
    jobs = [Workload("dense", 1, length, 1, 16) for length in (64, 32, 13)]
    prewarming = Prewarming(fake_worker(tmp_path), {}, jobs, workers=2)
    assert prewarming.finish() == ["triton_sigmoid: RuntimeError: out of memory"]
    prewarming.close()


def test_prewarming_takes_one_sequence_of_each_shape_with_kernels_of_its_own():
    shapes = [
        workload(n, t, h) for n in WORKLOAD_NAMES[:3] for t in (1024, 2048) for h in (64, 128)
    ]
    jobs = prewarm_jobs(shapes)
    assert len(jobs) == 8  # two lengths, two head sizes, padded or not
    assert all(job.batch == 1 for job in jobs)
    assert sum(job.lengths is None for job in jobs) == 4


def test_the_worker_sees_neither_our_triton_nor_our_settings():
    ours = {"PYTHONPATH": "x", "TRITON_PTXAS_PATH": "y", "TRITON_CACHE_DIR": "z", "HOME": "h"}
    assert worker_environment(ours) == {"TRITON_CACHE_DIR": "z", "HOME": "h"}
    assert worker_command("python3", "folder") == [
        "python3",
        "-P",
        str(SCRIPT),
        "--path",
        "folder",
    ]
