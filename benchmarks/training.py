"""The same model trained through "triton" and through "xla": equal losses within noise.

    python -m benchmarks.training pbmc3k.h5ad --out FOLDER -- --layers 4 --steps 150

runs ``sigjax train`` for each implementation and seed, one after the other, with what follows
the two dashes; keeps every loss.csv as train_DATA_IMPLEMENTATION_SEED.csv and compares. With
--compare-only it reads the files that are there.

Equal seeds give equal batches: implementations differ by rounding alone. What that comes to is
set beside what another seed changes, which is the noise of a training run.
"""

import argparse
import csv
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

IMPLEMENTATIONS = ("triton", "xla")
SEEDS = (0, 1)

type Curves = dict[tuple[str, int], np.ndarray]  # [steps] losses by implementation and seed


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 where the implementations differ less than the seeds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="an .h5ad file, as of sigjax train")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--compare-only", action="store_true", help="read what is there")
    parser.add_argument("train", nargs="*", help="after --: further arguments of sigjax train")
    options = parser.parse_args(arguments)
    name = options.data.stem
    if not options.compare_only:
        for implementation in IMPLEMENTATIONS:
            for seed in SEEDS:
                run(options.data, options.out, implementation, seed, options.train)
    curves = read(options.out, name)
    same, other = differences(curves)
    print(f"between implementations, of one seed: {same:.4f} root mean square of the loss")
    print(f"between seeds, of one implementation: {other:.4f}")
    print(draw(curves, options.out / f"train_{name}.png"))
    return int(same >= other)


def run(data: Path, out: Path, implementation: str, seed: int, more: Sequence[str]) -> None:
    """Trains once and keeps the losses."""
    out.mkdir(parents=True, exist_ok=True)
    folder = out / f"run_{data.stem}_{implementation}_{seed}"
    choices = ["--implementation", implementation, "--seed", str(seed)]
    program = "import sys; from sigjax.models.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "train", str(data), "--out", str(folder)]
    subprocess.run([*command, *choices, *more], check=True)
    losses_file(out, data.stem, implementation, seed).write_bytes(
        (folder / "loss.csv").read_bytes()
    )


def losses_file(out: Path, name: str, implementation: str, seed: int) -> Path:
    """Where the losses of a run are kept."""
    return out / f"train_{name}_{implementation}_{seed}.csv"


def read(out: Path, name: str) -> Curves:
    """The losses of all runs.

    Raises:
        ValueError: runs of unequal length.
    """
    curves: Curves = {}
    for implementation in IMPLEMENTATIONS:
        for seed in SEEDS:
            with losses_file(out, name, implementation, seed).open(newline="") as file:
                losses = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
            curves[implementation, seed] = np.array(losses)
    if len(lengths := {len(curve) for curve in curves.values()}) > 1:
        msg = f"the runs must have as many steps as each other, got {sorted(lengths)}"
        raise ValueError(msg)
    return curves


def differences(curves: Curves) -> tuple[float, float]:
    """Root mean square over the steps: between implementations of a seed, and between seeds."""

    def rms(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
        return float(np.sqrt(np.mean([(a - b) ** 2 for a, b in pairs])))

    first, second = IMPLEMENTATIONS
    same = [(curves[first, seed], curves[second, seed]) for seed in SEEDS]
    other = [(curves[name, SEEDS[0]], curves[name, SEEDS[1]]) for name in IMPLEMENTATIONS]
    return rms(same), rms(other)


def draw(curves: Curves, path: Path) -> Path:
    """The losses over the steps, a panel a seed."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.subplots(1, len(SEEDS), sharey=True)
    for seed, panel in zip(SEEDS, axes, strict=True):
        for implementation, style in zip(IMPLEMENTATIONS, ("-", ":"), strict=True):
            curve = curves[implementation, seed]
            panel.plot(np.arange(1, len(curve) + 1), curve, style, label=implementation)
        panel.set(title=f"seed {seed}", xlabel="step", yscale="log")
    axes[0].set_ylabel("masked-expression loss")
    axes[0].legend()
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    sys.exit(main())
