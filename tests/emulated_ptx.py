"""Inline PTX of the Hopper kernels in NumPy: what a warp computes, for tests without a GPU.

Or a warpgroup, where the inputs are as long and no warp votes. Branches have to be the same for all
threads. Arithmetic is that of float32, with subnormal numbers as
0; ex2 and rcp are exact where the hardware's are approximate.
"""

import re
from collections.abc import Callable, Iterable

import ml_dtypes
import numpy as np

LANES = 32
FLOAT32 = np.dtype("float32")
SMALLEST = np.finfo("float32").smallest_normal
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

type Registers = dict[str, np.ndarray]


def run(ptx: str, inputs: Iterable[np.ndarray], outputs: int, registers: Registers) -> np.ndarray:
    """Outputs [outputs, threads] uint32 of operands of 32 bits, each of as many.

    Registers are those that the PTX does not declare; what it writes there stays.
    """
    for i, values in enumerate(inputs):
        registers[f"${outputs + i}"] = np.ascontiguousarray(values).view(np.uint32)
    registers["threads"] = np.arange(len(registers[f"${outputs}"]))
    statements, labels = _parsed(ptx)
    at = 0
    with np.errstate(all="ignore"):
        while at < len(statements):
            at = labels.get(_step(statements[at], registers), at + 1)
    return np.stack([registers[f"${i}"] for i in range(outputs)])


def _parsed(ptx: str) -> tuple[list[str], dict[str, int]]:
    statements: list[str] = []
    labels: dict[str, int] = {}
    for part in re.split(r"[;{}]", ptx):
        text = part.strip()
        while found := re.match(r"([A-Z]+):\s*", text):
            labels[found[1]] = len(statements)
            text = text[found.end() :]
        if text and not text.startswith(".reg"):
            statements.append(text)
    return statements, labels


def _step(statement: str, registers: Registers) -> str:
    """Runs a statement; the label that it goes to, or nothing."""
    found = re.fullmatch(r"(?:@(!?)(\w+)\s+)?([\w.]+)\s+(.*)", statement, re.DOTALL)
    assert found, statement
    negated, predicate, code, rest = found.groups()
    operands = [x.strip() for x in rest.split(",")]
    if code == "bra.uni":
        taken = True
        if predicate:
            values = registers[predicate] != bool(negated)
            assert values.all() or not values.any(), statement
            taken = bool(values[0])
        return operands[0] if taken else ""
    assert not negated, statement
    names = operands[0].split("|")
    threads = registers["threads"]
    values = [_value(x, registers) for x in operands[1:]]
    results = _compute(code, values)
    for name, value in zip(names, results if len(names) > 1 else [results], strict=True):
        value = np.broadcast_to(value, threads.shape)
        registers[name] = (
            np.where(registers[predicate], value, registers[name]) if predicate else value.copy()
        )
    return ""


def _value(operand: str, registers: Registers) -> np.ndarray:
    if operand in registers:
        return registers[operand]
    number = int(operand[2:], 16) if operand[:2] in ("0f", "0x") else int(operand)
    return np.full(registers["threads"].shape, number & 0xFFFFFFFF, np.uint32)


def _compute(code: str, x: list[np.ndarray]) -> np.ndarray | list[np.ndarray]:
    name, *kinds = code.split(".")
    if name == "setp" and kinds[-1] == "f32":
        return COMPARISONS[kinds[0]](*(value.view(FLOAT32) for value in x))
    if "f32" in kinds and name in FLOATS:
        ftz = _flushed if "ftz" in kinds else (lambda value: value)
        function = FLOATS[f"{name}.NaN" if "NaN" in kinds else name]
        return ftz(function(*(ftz(value.view(FLOAT32)) for value in x))).view(np.uint32)
    if name == "cvt":
        high, low = (value.view(FLOAT32) for value in x)
        if "relu" in kinds:
            high, low = (np.maximum(value, np.float32(0)) for value in (high, low))
        return _packed(low.astype(BFLOAT16), high.astype(BFLOAT16))
    if code == "max.NaN.bf16x2":
        first, second = (_halves(value) for value in x)
        largest = (np.maximum(a, b) for a, b in zip(first, second, strict=True))
        return _packed(*(value.astype(BFLOAT16) for value in largest))
    if code == "setp.gtu.bf16x2":
        return [~(a <= b) for a, b in zip(*(_halves(value) for value in x), strict=True)]
    return INTEGERS[code](*x)


def _flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < SMALLEST, np.copysign(FLOAT32.type(0), x), x).astype(FLOAT32)


def _halves(x: np.ndarray) -> list[np.ndarray]:
    """Low and high half, as float32."""
    return [half.astype(np.uint16).view(BFLOAT16).astype(FLOAT32) for half in (x & 0xFFFF, x >> 16)]


def _packed(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.view(np.uint16) | high.view(np.uint16).astype(np.uint32) << 16


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (a.astype("float64") * b + c).astype(FLOAT32)


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    result = np.zeros_like(a)
    for i in range(8):
        if int(table[0]) >> i & 1:
            terms = (x if i >> (2 - j) & 1 else ~x for j, x in enumerate((a, b, c)))
            result |= np.bitwise_and.reduce(list(terms))
    return result


FLOATS: dict[str, Callable[..., np.ndarray]] = {
    "fma": _fma,
    "add": np.add,
    "mul": np.multiply,
    "neg": np.negative,
    "mov": lambda a: a,
    "ex2": lambda a: np.exp2(a.astype("float64")).astype(FLOAT32),
    "rcp": lambda a: (1 / a.astype("float64")).astype(FLOAT32),
    "min.NaN": np.minimum,
    "min": np.fmin,
    "max": np.fmax,
}
COMPARISONS: dict[str, Callable[..., np.ndarray]] = {"gt": np.greater, "eq": np.equal}
INTEGERS: dict[str, Callable[..., np.ndarray]] = {
    "mov.b32": lambda a: a,
    "and.b32": np.bitwise_and,
    "shl.b32": np.left_shift,
    "sub.s32": np.subtract,
    "lop3.b32": _lop3,
    "setp.gt.s32": lambda a, b: a.view(np.int32) > b.view(np.int32),
    "setp.eq.u32": np.equal,
    "setp.lt.u32": np.less,
    "selp.f32": lambda a, b, p: np.where(p, a, b),
    "or.pred": np.logical_or,
    "vote.sync.any.pred": lambda p, _: np.full(LANES, p.any()),
    "barrier.cta.red.or.pred": lambda _barrier, _threads, p: np.array(p.any()),
    "barrier.cta.red.popc.u32": lambda _barrier, _threads, p: np.array(p.sum(), np.uint32),
    "setp.gt.u32": np.greater,
    "selp.b32": lambda a, b, p: np.where(p, a, b),
}
