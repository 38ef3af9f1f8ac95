"""Under jit the op keeps batch and heads where they are; proven on eight simulated devices."""

import pytest

from tests.calls import CALLS
from tests.other_process import OtherProcess

MOST = ("plain", "everything")
CASES = [
    *((call, "equal heads", "both", "Auto") for call in CALLS),
    *((call, "equal heads", mesh, "Auto") for call in MOST for mesh in ("batch", "heads")),
    *(
        (call, sizes, "both", "Auto")
        for call in MOST
        for sizes in ("grouped heads", "fewer key heads", "one key head")
    ),
    *((call, "equal heads", "both", "Explicit") for call in (*MOST, "shared bias and mask")),
    *(("plain", sizes, "heads", "Explicit") for sizes in ("fewer key heads", "one key head")),
]
cases = pytest.mark.parametrize("case", CASES, ids=["-".join(case) for case in CASES])


@cases
def test_the_forward_pass_moves_nothing(case: tuple[str, ...], eight_devices: OtherProcess):
    problem = eight_devices.check("tests.sharded_cases", "forward_moves_nothing", *case)
    assert problem is None, problem


@cases
def test_the_backward_pass_only_adds_up_what_devices_share(
    case: tuple[str, ...], eight_devices: OtherProcess
):
    problem = eight_devices.check("tests.sharded_cases", "backward_adds_up_what_is_shared", *case)
    assert problem is None, problem


SHARD_MAPS = [
    *((call, "equal heads", "Auto") for call in CALLS),
    *((call, "fewer key heads", "Explicit") for call in ("plain", "lengths", "head bias")),
]


@pytest.mark.parametrize("case", SHARD_MAPS, ids=["-".join(case) for case in SHARD_MAPS])
def test_shard_map_equals_one_device(case: tuple[str, ...], eight_devices: OtherProcess):
    problem = eight_devices.check("tests.sharded_cases", "shard_map_equals_one_device", *case)
    assert problem is None, problem


SINGLE = {
    "a sharded length is gathered and right": (),
    "heads that do not divide are gathered and right": (),
    "a layer of sharded weights only adds up": ("Auto",),
    "a layer of sharded weights only adds up, explicit": ("Explicit",),
    "triton is partitioned": ("Auto",),
    "triton is partitioned, explicit": ("Explicit",),
    "a mapped axis may be sharded": (),
    "a mapped axis may be explicit": (),
    "calls outside of jit stay sharded": (),
}


@pytest.mark.parametrize("claim", SINGLE)
def test_sharding(claim: str, eight_devices: OtherProcess):
    function = claim.split(",")[0].replace(" ", "_")
    problem = eight_devices.check("tests.sharded_cases", function, *SINGLE[claim])
    assert problem is None, problem
