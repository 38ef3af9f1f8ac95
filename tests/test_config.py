"""Settings: what is refused, and that they survive being written."""

from dataclasses import replace

import pytest

from sigjax.models.config import (
    DataConfig,
    InputError,
    ModelConfig,
    TrainConfig,
    check_implementation,
)


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        (ModelConfig(), "layers", 0),
        (ModelConfig(), "width", 130),
        (ModelConfig(), "heads", -1),
        (ModelConfig(), "layers", True),
        (ModelConfig(), "attention", "linear"),
        (ModelConfig(), "dtype", "float16"),
        (DataConfig(), "max_genes", 0),
        (DataConfig(), "encoding", "log2"),
        (DataConfig(), "bins", 0),
        (DataConfig(), "pack_window", -1),
        (DataConfig(), "buckets", 0),
        (DataConfig(), "query_genes", 0),
        (DataConfig(), "tokens_per_batch", 1.5),
        (DataConfig(), "values", ""),
        (DataConfig(), "mask_share", 0.0),
        (DataConfig(), "mask_share", 1.0),
        (TrainConfig(), "steps", 0),
        (TrainConfig(), "seed", -1),
        (TrainConfig(), "learning_rate", 0.0),
        (TrainConfig(), "learning_rate", float("nan")),
        (TrainConfig(), "clip_norm", -1.0),
        (TrainConfig(), "weight_decay", -0.1),
        (TrainConfig(), "profile_weight", -1.0),
        (TrainConfig(), "held_out", 1.0),
        (TrainConfig(), "warmup_share", 0.0),
    ],
    ids=lambda x: type(x).__name__ if hasattr(x, "__dataclass_fields__") else str(x),
)
def test_a_setting_out_of_range_is_refused_by_name(config, name, value):
    with pytest.raises(InputError, match=name):
        replace(config, **{name: value})


def test_a_models_settings_survive_being_written():
    config = ModelConfig(layers=2, width=64, attention="softmax", dtype="bfloat16")
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("change", [{"extra": 1}, {"layers": None}], ids=["unknown", "missing"])
def test_settings_that_are_not_a_models_are_refused(change):
    values = {k: v for k, v in (ModelConfig().to_dict() | change).items() if v is not None}
    with pytest.raises(InputError, match="settings must be"):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize(
    ("attention", "implementation"), [("sigmoid", "cudnn"), ("softmax", "triton")]
)
def test_an_implementation_that_does_not_serve_the_attention_is_refused(attention, implementation):
    with pytest.raises(InputError, match=f"implementation of {attention}"):
        check_implementation(attention, implementation)
