"""Turns of the consumers at the tensor cores (Gluon device code of the Hopper forward kernel).

With WHERE_EXACT each consumer says of every tile whether its weights are exact there, and who has
no rows in it that they are not. Turns are taken in tiles of which all say so: one who says no waits
for nobody.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from sigjax.kernels.hopper_math import uniform

NEVER = gl.constexpr(0)
ALWAYS = gl.constexpr(1)
WHERE_EXACT = gl.constexpr(2)  # with adaptive weights, where all consumers have the same keys


class Turns(NamedTuple):
    """What the consumers of a program share."""

    barriers: Any  # an mbarrier each; None where nobody takes turns
    decisions: Any  # of WHERE_EXACT, or None


class Decisions(NamedTuple):
    """A place where consumers say of every tile whether its weights are exact."""

    decided: Any  # an mbarrier for each tile whose queries may be in shared memory
    said: Any  # [those tiles * consumers, 1] int32


class Agreement(NamedTuple):
    """What a consumer needs to agree on a tile."""

    turns: Turns
    tiles: Any  # with keys, so far


class TileTurns(NamedTuple):
    """The turns of one tile."""

    barriers: Any
    taken: Any  # 1 where they are taken, and until that is agreed
    decisions: Any
    tiles: Any


@gluon.jit
def new_turns(TURNS: gl.constexpr, TILES: gl.constexpr, CONSUMERS: gl.constexpr):
    """What consumers share; TILES is how many tiles' queries may be in shared memory."""
    if TURNS == NEVER:
        return Turns(None, None)
    elif TURNS == ALWAYS:
        return Turns(new_barriers(CONSUMERS, 1), None)
    else:
        said = gl.allocate_shared_memory(
            gl.int32, [TILES * CONSUMERS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
        )
        barriers = new_barriers(CONSUMERS, 1)
        return Turns(barriers, Decisions(new_barriers(TILES, CONSUMERS), said))


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
    if turns.barriers is None or turns.decisions is not None:
        return None
    else:
        return TileTurns(turns.barriers, 1, None, 0)


@gluon.jit
def turns_of_exact(agreement):
    """The turns of a tile with exact weights, or None."""
    turns = agreement.turns
    if turns.barriers is None:
        return None
    elif turns.decisions is None:
        return TileTurns(turns.barriers, 1, None, 0)
    else:
        return TileTurns(turns.barriers, 1, turns.decisions, agreement.tiles)


@gluon.jit
def decide(agreement, exact, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """Tells the others whether a consumer's weights are exact in a tile.

    Each has to do so in every tile with keys, before it is done with its queries: that nobody is
    more tiles ahead than there are queries in shared memory keeps what was said from being
    overwritten before it was read.
    """
    decisions = agreement.turns.decisions
    if decisions is not None:
        stage = agreement.tiles % decisions.decided.shape[0]
        value = gl.zeros([1], gl.int32, layout=one_layout()) + gl.where(exact, 1, 0)
        decisions.said.index(stage * CONSUMERS + CONSUMER).store(value)
        mbarrier.arrive(decisions.decided.index(stage), count=1)


@gluon.jit
def agreed(turns, CONSUMERS: gl.constexpr):
    """The turns of a tile, once it is known whether they are taken: waits until all have said."""
    if turns is None:
        return None
    elif turns.decisions is None:
        return turns
    else:
        decided, said = turns.decisions.decided, turns.decisions.said
        STAGES: gl.constexpr = decided.shape[0]
        stage = turns.tiles % STAGES
        mbarrier.wait(decided.index(stage), (turns.tiles // STAGES) & 1)
        taken = gl.to_tensor(1)
        for i in gl.static_range(CONSUMERS):
            value = said.index(stage * CONSUMERS + i).load(one_layout())
            taken = taken & gl.min(value, axis=0)
        return TileTurns(turns.barriers, uniform(taken), turns.decisions, turns.tiles)


@gluon.constexpr_function
def one_layout():
    """Of a tensor of one element, which all threads have."""
    return gl.BlockedLayout([1], [32], [4], [0])


@gluon.jit
def take_turn(turns, turn, CONSUMER: gl.constexpr):
    """Waits for the tensor cores; consumer 0 begins."""
    if turns is not None:
        begins: gl.constexpr = 1 if CONSUMER == 0 else 0
        mbarrier.wait(turns.barriers.index(CONSUMER), (turn & 1) ^ begins, pred=turns.taken > 0)


@gluon.jit
def pass_turn(turns, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr):
    """Lets the next consumer have the tensor cores."""
    if turns is not None:
        following: gl.constexpr = (CONSUMER + 1) % CONSUMERS
        mbarrier.arrive(turns.barriers.index(following), count=1, pred=turns.taken > 0)


@gluon.jit
def after(turns, turn):
    """The number of the turn that follows one, the same where it is not taken."""
    if turns is None:
        return turn
    else:
        return turn + turns.taken
