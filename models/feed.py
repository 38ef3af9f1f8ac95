"""Batches ahead of the step that takes them: collated and moved to the device by threads."""

from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from grain.experimental import ThreadPrefetchIterDataset, multithread_prefetch

from sigjax.models.batches import BatchStream
from sigjax.models.collate import AnyBatch

# One batch in use, one on its way: more would only hold memory of the device.
ON_DEVICE = 2
# Batches that wait on the host, so that one slow to collate delays no step.
ON_HOST = 4


class Fed(NamedTuple):
    """A batch on the device.

    Attributes:
        batch: arrays of jax.
        cells: its cells, what fills up not counted; an int, known without a transfer.
    """

    batch: AnyBatch
    cells: int


def feed(
    stream: BatchStream, state: dict[str, Any] | None = None, *, workers: int = 0
) -> grain.DatasetIterator[Fed]:
    """Batches of a stream without end, on the default device, two ahead of the caller.

    Args:
        stream: what to feed; packed batches where its config.pack_window is not 0.
        state: of another feed's get_state with as many workers, to go on behind the batch that
            it gave last.
        workers: threads that collate; 0 and 1 collate in one. Batches and their order are the
            same with any number.

    Returns:
        An iterator with get_state, set_state and close, which stops its threads.

    Raises:
        InputError: the state is of other cells or settings.
    """
    packs = stream.config.pack_window > 0
    # Any: a grain dataset of either batch is, to a type checker, none of both.
    dataset: grain.IterDataset[Any] = stream.packed_dataset() if packs else stream.dataset()
    if workers > 1:
        dataset = multithread_prefetch(dataset, workers, ON_HOST)
    else:
        dataset = ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=ON_HOST)
    on_device = ThreadPrefetchIterDataset(dataset.map(_moved), prefetch_buffer_size=ON_DEVICE)
    batches = iter(on_device)
    if state is not None:
        batches.set_state(state)
    return batches


def _moved(batch: AnyBatch) -> Fed:
    return Fed(jax.device_put(batch), int(np.count_nonzero(batch.real)))
