"""Efficiency on several GPUs of one host, in one process: attention, training, long sequences.

    python -m benchmarks.devices --out FOLDER --devices 1,2

measures three parts on the first GPUs that jax sees and writes devices.csv and devices.png:

- op: sigmoid_attention under jit with batch or heads sharded, forward and with backward;
- train: the data-parallel step of sigjax.models.train, with as many tokens on every device;
- context: context_parallel_attention against sigmoid_attention on one device.

A cell's contenders are the same work on one device and on more. They take turns in bursts with
rests, as in benchmarks.attention, and an efficiency is a ratio within a round: t(1) / t(n) where
work grows with the devices ("weak"), t(1) / (n · t(n)) where it does not ("strong"). Before it is
timed, every program's results are compared with one device's, and the collectives in what XLA
compiled are counted; the exit status is 1 where attention's forward pass has any, where anything
gathers, or where results differ by more than rounding.

The ring's sends alone, of the sizes and number that a forward and a backward pass have, are timed
within the same rounds: communication_share is their time over the whole call's, an upper bound of
what they cost it, for they travel while a block is computed, and XLA may let both passes share
what they both send. From these times the efficiency on 4 and 8 devices is
predicted where those were not measured: rows of kind "predicted", see devices_model.py.

To try it anywhere, on eight simulated devices of a CPU and with tiny sizes:

    python -m benchmarks.devices --out FOLDER --small --devices 1,2,8
"""

import os
import sys
from collections.abc import Sequence

from benchmarks.devices_options import UsageError, parse, prepare_environment


def main(argv: Sequence[str] | None = None) -> int:
    """The command: 0 where everything that was measured keeps its promise."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = parse(argv, __doc__)
    prepare_environment(os.environ, small=options.small)
    # Not before: jax reads the environment when it is imported.
    from benchmarks.devices_run import run

    try:
        return run(options, argv)
    except UsageError as error:
        sys.exit(f"python -m benchmarks.devices: {error}")


if __name__ == "__main__":
    sys.exit(main())
