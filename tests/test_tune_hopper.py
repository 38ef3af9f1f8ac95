"""Versions of the Hopper kernels that are timed: those that a call would have."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import tune_hopper
from sigjax.kernels.tiles import ForwardTile, hopper_forward_tile
from sigjax.testing import workload


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The tiles of the versions of a length, none of which is compiled."""

    def version(name: str, call: partial, _: Any) -> SimpleNamespace:
        return SimpleNamespace(name=name, tile=call.args[1])

    monkeypatch.setattr(tune_hopper, "Version", version)

    def of(length: int, *names: str) -> list[ForwardTile]:
        shape = workload("dense", length, 128)
        versions: list[Any] = tune_hopper.compiled(shape, "forward", (), names or None)
        assert not names or [version.name for version in versions] == list(names)
        return [version.tile for version in versions]

    return of


def test_few_keys_have_the_tile_that_a_call_of_as_many_has(tiles: Any):
    few, many = (tiles(length, "table")[0] for length in (1024, 4096))
    assert few == hopper_forward_tile(128).for_keys(1024)
    assert (few.weights, many.weights) == ("pair", "adaptive")


def test_rivals_that_are_adaptive_all_the_same_stay_so(tiles: Any):
    assert tiles(1024, "adaptive")[0].weights == "adaptive"


def test_where_keys_are_many_each_version_differs_from_the_table(tiles: Any):
    table, *rivals = tiles(4096)
    own = hopper_forward_tile(128, short=True)  # there is no tile for short arrays at 128
    assert own == table
    assert len(rivals) > 5
    assert rivals.count(table) == 1
