"""Speed of attention, forward and backward alone, against softmax and triton-sigmoid.

    python -m benchmarks.attention --triton-sigmoid-path PATH

runs every named workload of sigjax.testing on an NVIDIA GPU and writes
attention.csv and one picture per workload to benchmarks/results/CARD. It needs
jax[cuda13], jax-triton, nvidia-ml-py and matplotlib. Where torch and PyPI's
triton-sigmoid can be imported in another process, they take part.

Before a shape is timed, output and gradients of sigjax are compared with the
definition; what fails is not timed, and the exit status is 1. Then contenders
take turns in bursts of about 30 ms with half a second of rest (measure.py says
why), ratios are taken within each round, and clock, temperature and slowdown
reasons are kept with each row. Softmax contenders are given the same lengths.

A cell is a workload, T, head size and direction. Measured cells replace those of
the same name in attention.csv as a whole and leave the others as they are, so a
long list can be measured in several runs:

    python -m benchmarks.attention --workloads dense --contenders sigjax,jax_cudnn,triton_sigmoid
    python -m benchmarks.attention --workloads padded25,padded50,ragged --time-budget-s 560

Their folders are put together by benchmarks.plot. To try a checkout on a CPU:

    python -m benchmarks.attention --device cpu --tokens 256 --width 64 --lengths 64 --head-sizes 32

jax_xla, which forms all T x S logits, is measured up to T = 4,096.
"""

import contextlib
import os
import re
import sys
import time
from collections.abc import Sequence

import jax

from benchmarks import options, provenance
from benchmarks.clocks import NoProbe, NvmlProbe, Probe
from benchmarks.jax_contenders import JaxContender
from benchmarks.plot import plot
from benchmarks.report import Progress, table
from benchmarks.rows import CSV_NAME, TRITON_SIGMOID, merge, read_csv
from benchmarks.run import AnyContender, Run, brief
from benchmarks.torch_contender import (
    Prewarming,
    TorchContender,
    WorkerError,
    prewarm_jobs,
    worker_command,
    worker_environment,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 where the gate failed or nothing was measured."""
    argv = sys.argv[1:] if argv is None else list(argv)
    chosen = options.parse(argv, __doc__ or "")
    started = time.monotonic()
    budget = float("inf") if chosen.time_budget_s is None else chosen.time_budget_s
    probe = _device(chosen.device)
    folder = chosen.out or provenance.ROOT / "benchmarks" / "results" / slug(probe.card)
    old_rows = read_csv(folder / CSV_NAME)
    with contextlib.ExitStack() as stack:
        contenders, missing = _contenders(chosen, stack)
        total = len(chosen.workloads) * len(chosen.directions)
        progress = stack.enter_context(Progress(total))
        worker = next((c for c in contenders if isinstance(c, TorchContender)), None)
        origin = provenance.collect(
            card=probe.card,
            driver=probe.driver,
            worker_versions={} if worker is None else worker.versions,
            argv=argv,
            commit=chosen.commit,
        )
        run = Run(
            chosen,
            contenders,
            probe,
            origin,
            folder,
            old_rows,
            progress,
            started + budget,
            unmeasured=missing,
        )
        _check_while_prewarming(run, stack, prewarm=worker is not None and chosen.prewarm > 0)
        run.measure()
    return _conclude(run)


def _device(device: str) -> Probe:
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
        return NoProbe()
    # The worker needs part of the memory; read when the backend starts, on the next line.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if jax.default_backend() != "gpu":
        msg = f"jax must see an NVIDIA GPU, got {jax.default_backend()}; or use --device cpu"
        raise SystemExit(msg)
    return NvmlProbe()


def _contenders(
    chosen: options.Options, stack: contextlib.ExitStack
) -> tuple[tuple[AnyContender, ...], list[str]]:
    contenders: list[AnyContender] = []
    missing: list[str] = []
    for name in chosen.contenders:
        if name != TRITON_SIGMOID:
            contenders.append(JaxContender(name))
            continue
        command = worker_command(chosen.worker_python, chosen.triton_sigmoid_path)
        worker = stack.enter_context(TorchContender(command, worker_environment(os.environ)))
        try:
            reason = worker.hello()
        except WorkerError as error:
            reason = brief(error)
        if reason is not None:
            missing.append(f"{name}: not installed ({reason})")
        else:
            contenders.append(worker)
    return tuple(contenders), missing


def _check_while_prewarming(run: Run, stack: contextlib.ExitStack, *, prewarm: bool) -> None:
    if not prewarm:
        return
    command = worker_command(run.options.worker_python, run.options.triton_sigmoid_path)
    jobs = prewarm_jobs(run.options.workloads)
    prewarming = Prewarming(command, worker_environment(os.environ), jobs, run.options.prewarm)
    stack.callback(prewarming.close)
    # Those that the budget leaves no time for now are checked before they are measured.
    until = time.monotonic() + (run.deadline - time.monotonic()) / 4
    for workload in run.options.workloads:
        if time.monotonic() < until:
            run.check(workload)
    run.progress.say("waiting for triton-sigmoid's kernels to compile")
    for problem in prewarming.finish():
        run.progress.say(f"prewarming: {problem}")


def _conclude(run: Run) -> int:
    if run.rows:
        print(table(run.rows))
        pictures = plot(merge(run.old_rows, run.rows), run.folder)
        for path in (run.folder / CSV_NAME, *pictures):
            print(f"written: {path}")
    for text in run.unmeasured:
        print(f"not measured: {text}")
    return 1 if run.gate_failed or not run.rows else 0


def slug(card: str) -> str:
    """A folder name for a card: "NVIDIA H100 80GB HBM3" is "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
