"""The definition equals the float64 oracle that shares no line with it."""

import jax
import numpy as np
import pytest

from sigjax import numerics
from sigjax.numerics import Case


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
def test_the_definition_in_float64_equals_the_oracle(biases: bool, is_causal: bool):
    lengths = ((20, 30), (7, 0), (0, 30), (1, 1))
    case = Case("float64", 16, 20, 30, 2, is_causal, biases, lengths)
    with jax.enable_x64(True):
        inputs = numerics.make_inputs(case)
        got = numerics.run_plain(case, inputs)
    for name, want in numerics.exact(case, inputs).items():
        if not name.endswith("magnitude"):
            np.testing.assert_allclose(got[name], want, rtol=1e-10, atol=1e-12, err_msg=name)
