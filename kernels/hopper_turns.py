"""Turns of the consumers at the tensor cores (Gluon device code of the Hopper forward kernel).

Consumers share (barriers, decisions): an mbarrier each, or None where nobody takes turns; and, with
WHERE_EXACT, (mbarriers, what was said), a place where each says of every tile whether its weights
are exact there, and who has no rows in it that they are not. Turns are taken in tiles of which all
say so: one who says no waits for nobody. An agreement is (what they share, tiles with keys so far).

The turns of a tile are (barriers, taken, decisions, tiles so far), or None. taken is 1 where they
are taken, and until that is agreed.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from sigjax.kernels.hopper_math import uniform

NEVER = gl.constexpr(0)
ALWAYS = gl.constexpr(1)
WHERE_EXACT = gl.constexpr(2)  # with adaptive weights, where all consumers have the same keys


@gluon.jit
def new_turns(TURNS: gl.constexpr, TILES: gl.constexpr, CONSUMERS: gl.constexpr):
    """What consumers share; TILES is how many tiles' queries may be in shared memory."""
    if TURNS == NEVER:
        return None, None
    elif TURNS == ALWAYS:
        return new_barriers(CONSUMERS, 1), None
    else:
        said = gl.allocate_shared_memory(
            gl.int32, [TILES * CONSUMERS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
        )
        return new_barriers(CONSUMERS, 1), (new_barriers(TILES, CONSUMERS), said)


@gluon.jit
def new_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """So many mbarriers, each of as many arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def turns_of_all(turns):
    """The turns of a tile that take place whatever its weights are, or None."""
    barriers, decisions = turns
    if barriers is None or decisions is not None:
        return None
    else:
        return barriers, 1, None, 0


@gluon.jit
def turns_of_exact(agreement):
    """The turns of a tile with exact weights, or None."""
    turns, tiles = agreement
    barriers, decisions = turns
    if barriers is None:
        return None
    elif decisions is None:
        return barriers, 1, None, 0
    else:
        return barriers, 1, decisions, tiles


@gluon.jit
def decide(agreement, exact, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """Tells the others whether a consumer's weights are exact in a tile.

    Each has to do so in every tile with keys, before it is done with its queries: that nobody is
    more tiles ahead than there are queries in shared memory keeps what was said from being
    overwritten before it was read.
    """
    turns, tiles = agreement
    if turns[1] is not None:
        decided, said = turns[1]
        stage = tiles % decided.shape[0]
        value = gl.zeros([1], gl.int32, layout=one_layout()) + gl.where(exact, 1, 0)
        said.index(stage * CONSUMERS + CONSUMER).store(value)
        mbarrier.arrive(decided.index(stage), count=1)


@gluon.jit
def agreed(turns, CONSUMERS: gl.constexpr):
    """The turns of a tile, once it is known whether they are taken: waits until all have said."""
    if turns is None:
        return None
    elif turns[2] is None:
        return turns
    else:
        barriers, decisions, tiles = turns[0], turns[2], turns[3]
        decided, said = decisions
        STAGES: gl.constexpr = decided.shape[0]
        stage = tiles % STAGES
        mbarrier.wait(decided.index(stage), (tiles // STAGES) & 1)
        taken = gl.to_tensor(1)
        for i in gl.static_range(CONSUMERS):
            value = said.index(stage * CONSUMERS + i).load(one_layout())
            taken = taken & gl.min(value, axis=0)
        return barriers, uniform(taken), decisions, tiles


@gluon.constexpr_function
def one_layout():
    """Of a tensor of one element, which all threads have."""
    return gl.BlockedLayout([1], [32], [4], [0])


@gluon.jit
def take_turn(turns, turn, CONSUMER: gl.constexpr):
    """Waits for the tensor cores; consumer 0 begins."""
    if turns is not None:
        begins: gl.constexpr = 1 if CONSUMER == 0 else 0
        mbarrier.wait(turns[0].index(CONSUMER), (turn & 1) ^ begins, pred=turns[1] > 0)


@gluon.jit
def pass_turn(turns, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """Lets the next consumer have the tensor cores."""
    if turns is not None:
        following: gl.constexpr = (CONSUMER + 1) % CONSUMERS
        mbarrier.arrive(turns[0].index(following), count=1, pred=turns[1] > 0)


@gluon.jit
def after(turns, turn):
    """The number of the turn that follows one, the same where it is not taken."""
    if turns is None:
        return turn
    else:
        return turn + turns[1]
