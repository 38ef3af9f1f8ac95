"""Cases that share what they do not depend on in turn, where all combinations would take long."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

HEAD_SIZES = (64, 128)


def in_turn(name: str, cases: Mapping[str, Any], **others: Iterable[Any]) -> pytest.MarkDecorator:
    """Each case once, with the next of the values of every other argument, of which one at least.

    For what is compiled or emulated; the tests on a GPU have all combinations.

    Example:
        >>> in_turn("call", {"dense": 1, "causal": 2}, head_size=(64, 128)).args[0]
        ('call', 'head_size')

    Raises:
        ValueError: there is no other argument: no case would be left.
    """
    if not others:
        msg = "in_turn needs another argument, got none"
        raise ValueError(msg)
    columns = zip(*(itertools.cycle(values) for values in others.values()), strict=False)
    rows = [
        pytest.param(case, *column, id="-".join([key, *map(str, column)]))
        for (key, case), column in zip(cases.items(), columns, strict=False)
    ]
    return pytest.mark.parametrize((name, *others), rows)
