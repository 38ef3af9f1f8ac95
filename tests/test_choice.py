"""Which implementation serves a call, and that a refusal says why."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sigjax
from sigjax import choice
from sigjax.choice import choose, compile_for
from sigjax.operands import Operands, Settings

X = jnp.ones((1, 8, 2, 64), jnp.bfloat16)
SETTINGS = Settings(scale=1.0)


def operands(dtype: str = "bfloat16", head_size: int = 64, **given: jax.Array) -> Operands:
    x = jnp.ones((1, 8, 2, head_size), dtype)
    return Operands(x, x, x, **given)


def test_a_gpu_takes_triton_and_a_cpu_takes_xla():
    with compile_for(90):
        assert choose(None, operands(), SETTINGS) == "auto"
        assert choose("triton", operands(), SETTINGS) == "triton"
        assert choose("xla", operands(), SETTINGS) == "xla"


REFUSED = {
    "small head": (operands(head_size=8), "it takes head sizes 16 to 256, got 8"),
    "large head": (operands(head_size=257), "it takes head sizes 16 to 256, got 257"),
}


@pytest.mark.parametrize(("given", "reason"), REFUSED.values(), ids=list(REFUSED))
def test_what_triton_cannot_serve_is_refused_by_name_and_served_by_default(
    given: Operands, reason: str
):
    with compile_for(90):
        with pytest.raises(NotImplementedError, match=reason):
            choose("triton", given, SETTINGS)
        assert choose(None, given, SETTINGS) == "xla"


def test_an_old_gpu_is_refused():
    with compile_for(75), pytest.raises(NotImplementedError, match=r"8\.0 or newer.* has 7\.5"):
        choose("triton", operands(), SETTINGS)


def test_float64_is_for_xla():
    with jax.enable_x64(True), compile_for(90):
        x = jnp.ones((1, 8, 2, 64), jnp.float64)
        given = Operands(x, x, x)
        assert choose(None, given, SETTINGS) == "xla"
        with pytest.raises(NotImplementedError, match="got float64"):
            choose("triton", given, SETTINGS)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="says what a host without a GPU answers")
def test_a_host_without_a_gpu_says_so_and_names_the_remedy():
    with pytest.raises(NotImplementedError, match=r"no NVIDIA GPU.*sigjax\[cuda\].*'xla'"):
        sigjax.sigmoid_attention(X, X, X, implementation="triton")
    assert np.isfinite(np.asarray(sigjax.sigmoid_attention(X, X, X), np.float32)).all()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    def version(package: str) -> str:
        raise choice.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(choice.importlib.metadata, "version", version)
    with compile_for(90):
        assert choice.host_refusal() == "jax-triton is not installed (pip install jax-triton)"
