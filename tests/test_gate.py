"""Contenders of jax and the gate that judges numbers before they are timed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gate, jax_contenders
from benchmarks.jax_contenders import JaxContender, make_inputs
from sigjax.testing import (
    Workload,
    workload,
)
from tests.benchmark_parts import TINY


def test_the_backward_pass_alone_gives_the_gradients():
    inputs = make_inputs(TINY)
    got = JaxContender("sigjax_xla").gradients(inputs)

    def loss(query, key, value):
        output = jax_contenders.ATTENTIONS["sigjax_xla"](query, key, value, inputs.lengths)
        return jnp.vdot(output, inputs.cotangent, preferred_element_type=jnp.float32)

    wanted = jax.grad(loss, argnums=(0, 1, 2))(*inputs[:3])
    for name, x, y in zip(gate.TENSORS[1:], got, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=name)


def test_a_burst_needs_prepare():
    contender = JaxContender("jax_xla")
    with pytest.raises(RuntimeError, match="jax_xla must be prepared before a burst"):
        contender.burst(1)
    contender.prepare(TINY, make_inputs(TINY), "forward")
    assert contender.burst(2) > 0
    contender.release()
    with pytest.raises(RuntimeError, match="must be prepared"):
        contender.burst(1)


def test_quadratic_memory_is_kept_to_short_sequences():
    longest = workload("dense", 16384, 64)
    assert JaxContender("jax_xla").refusal(longest) is not None
    assert JaxContender("sigjax_xla").refusal(longest) is None
    assert JaxContender("jax_xla").refusal(TINY) is None


def test_the_gate_judges_output_and_gradients_of_the_longest_and_the_shortest_row():
    inputs = make_inputs(Workload("padded25", 3, 32, 3, 16, (30, 24, 32)))
    verdicts = gate.judge(JaxContender("sigjax_xla"), inputs)
    assert [(v.row, v.tensor) for v in verdicts] == [
        (row, tensor) for row in (1, 2) for tensor in gate.TENSORS
    ]
    assert all(verdict.passed for verdict in verdicts), verdicts


@pytest.mark.parametrize("factor", [1.02, float("nan")], ids=str)
def test_the_gate_refuses_numbers_that_are_two_percent_off_or_nan(monkeypatch, factor):
    right = jax_contenders.ATTENTIONS["sigjax_xla"]
    wrong = lambda *x: right(*x) * jnp.bfloat16(factor)  # noqa: E731
    monkeypatch.setitem(jax_contenders.ATTENTIONS, "sigjax_xla", wrong)
    verdicts = gate.judge(JaxContender("sigjax_xla"), make_inputs(TINY))
    assert not any(verdict.passed for verdict in verdicts)
    assert "output of row 0: error" in str(verdicts[0])


@pytest.mark.parametrize(
    ("factor", "passed"), [(1.04, True), (1.2, False), (float("nan"), False)], ids=str
)
def test_the_gate_leaves_room_for_the_tanh_of_fast_sigmoid_in_the_output_alone(
    monkeypatch, factor, passed
):
    right = jax_contenders.ATTENTIONS["sigjax_xla"]
    wrong = lambda *x: right(*x) * jnp.bfloat16(factor)  # noqa: E731
    monkeypatch.setitem(jax_contenders.ATTENTIONS, "sigjax_fast", wrong)
    verdicts = gate.judge(JaxContender("sigjax_fast"), make_inputs(TINY))
    assert {v.passed for v in verdicts if v.tensor == "output"} == {passed}
    assert not any(v.passed for v in verdicts if v.tensor != "output")


def test_rows_of_equal_length_are_judged_first_and_last():
    assert gate.rows_to_judge(make_inputs(Workload("dense", 3, 8, 1, 16))) == [0, 2]
    assert gate.rows_to_judge(make_inputs(Workload("dense", 1, 8, 1, 16))) == [0]
