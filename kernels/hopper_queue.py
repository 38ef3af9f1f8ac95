"""Which tiles a program takes (Gluon device code of the Hopper forward kernel).

Without a counter every so many-th. With one the next that no program has: its producer asks for
it, and tells the consumers by a slot in shared memory. Who takes a tile changes no bit of it.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from sigjax.kernels.hopper_math import uniform
from sigjax.kernels.hopper_turns import new_barriers, one_layout

SLOTS = gl.constexpr(2)


class Queue(NamedTuple):
    """What the producer and the consumers of a program share."""

    counter_ptr: Any
    slots: Any  # [SLOTS, 1] int32
    said: Any  # mbarriers: a slot holds a tile's number
    heard: Any  # mbarriers: all consumers have read it


@gluon.jit
def new_queue(counter_ptr, CONSUMERS: gl.constexpr):
    """The queue of a program."""
    slots = gl.allocate_shared_memory(gl.int32, [SLOTS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return Queue(counter_ptr, slots, new_barriers(SLOTS, 1), new_barriers(SLOTS, CONSUMERS))


@gluon.jit
def ask(queue, tile, taken):
    """The tile after one, the taken-th of a program; for the producer, who tells it."""
    if queue is None:
        return tile + gl.num_programs(0)
    else:
        following = gl.num_programs(0) + gl.atomic_add(queue.counter_ptr, 1, sem="relaxed")
        slot = taken % SLOTS
        mbarrier.wait(queue.heard.index(slot), ((taken // SLOTS) & 1) ^ 1)
        queue.slots.index(slot).store(gl.zeros([1], gl.int32, layout=one_layout()) + following)
        mbarrier.arrive(queue.said.index(slot), count=1)
        return uniform(following)


@gluon.jit
def hear(queue, taken):
    """What ask gives, for a consumer, who is told."""
    slot = taken % SLOTS
    mbarrier.wait(queue.said.index(slot), (taken // SLOTS) & 1)
    following = gl.min(queue.slots.index(slot).load(one_layout()), axis=0)
    mbarrier.arrive(queue.heard.index(slot), count=1)
    return uniform(following)
