"""How large the work of benchmarks.devices is: on GPUs, and tiny."""

from dataclasses import dataclass
from typing import Literal

from benchmarks.measure import Plan
from sigjax.models.config import ModelConfig


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        implementation: of attention.
        plan: how long and how often to measure.
        head_size: H of op and context.
        batch: B of op, on one device.
        length: T of op.
        heads: N of op.
        model: of train.
        rows: B of train, on one device.
        row_length: T of train.
        genes: token ids of train.
        queries: genes that a batch of train asks for.
        contexts: T and N of context.
    """

    implementation: Literal["triton", "xla"]
    plan: Plan
    head_size: int
    batch: int
    length: int
    heads: int
    model: ModelConfig
    rows: int
    row_length: int
    genes: int
    queries: int
    contexts: tuple[tuple[int, int], ...]


FULL = Sizes(
    implementation="triton",
    plan=Plan(rounds=5, rest_s=0.25, retries=3, cool_s=3.0),
    head_size=128,
    batch=4,
    length=4096,
    heads=16,
    model=ModelConfig(layers=8, width=512, heads=8, dtype="bfloat16"),
    rows=8,
    row_length=2048,
    genes=20_000,
    queries=512,
    # A call of one GPU takes 0.1 to 0.3 s.
    contexts=((65_536, 8), (262_144, 1)),
)
SMALL = Sizes(
    implementation="xla",
    plan=Plan(rounds=2, burst_ms=1.0, rest_s=0.0, retries=0, cool_s=0.0),
    head_size=16,
    batch=1,
    length=64,
    heads=8,
    model=ModelConfig(layers=1, width=32, heads=2),
    rows=2,
    row_length=32,
    genes=64,
    queries=8,
    contexts=((256, 2),),
)
