"""Loops found in SASS, and the global loads in flight in them."""

import pytest
from conftest import KERNELS

from ptxsim import sass, static
from ptxsim.toolchain import has_tool

LOADS_IN_FLIGHT = {
    "one_at_a_time": 1,
    "four_and_a_remainder": 4,
    "four_then_one": 1,
    "two_wide_then_one_narrow": 2,
    "rows": 2,
    "chase": 1,
    "straight": 3,
    "no_loads": 0,
}


@pytest.mark.skipif(not (has_tool("nvcc") and has_tool("cuobjdump")), reason="CUDA tools not found")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_loads_in_flight_of_compiled_kernels(arch):
    reports = static.from_cuda(KERNELS / "loads.cu", arch)
    assert {report.name: report.loads_in_flight for report in reports} == LOADS_IN_FLIGHT


def parse(text):
    """Instructions, 16 bytes each, as cuobjdump writes them."""
    lines = [line.strip() for line in text.strip().splitlines()]
    return sass.parse("\n".join(f"/*{16 * i:04x}*/   {line} ;" for i, line in enumerate(lines)))


def test_a_load_is_in_flight_until_what_it_or_a_later_one_writes_is_named():
    first = "LDG.E.128 R4, desc[UR4][R2.64]\n LDG.E R8, desc[UR4][R2.64+0x10]\n"
    assert sass.in_flight(parse(first + "LDG.E.U16 R9, desc[UR4][R2.64+0x14]")) == 3
    for use in (
        "FADD R0, R8, R1",
        "STG.E.128 desc[UR4][R10.64], R8",
        "MOV R8, RZ",
        "LDG.E R0, desc[UR4][R8.64]",
    ):
        assert sass.in_flight(parse(first + use + "\n LDG.E R9, desc[UR4][R2.64+0x20]")) == 2
    for use in ("FADD R0, R7, R1", "FADD R0, -R4.reuse, R1", "DADD R0, R4, R0", "@!P0 MOV R5, RZ"):
        assert (
            sass.in_flight(
                parse(f"{first} {use}\n LDG.E R9, desc[UR4][R2.64+0x20]\n LDG.E R10, desc[UR4][R12.64]")
            )
            == 3
        )
    for other in (
        "FADD R0, R9, R1",
        "R2UR UR8, R1",
        "STG.E desc[UR8][R10.64], R0",
        "FADD R0, R1, c[0x0][0x8]",
    ):
        assert sass.in_flight(parse(f"{first} {other}\n LDG.E R9, desc[UR4][R2.64+0x20]")) == 3


def test_a_load_from_where_another_reads_does_not_count_twice():
    twice = "LDG.E R4, desc[UR4][R2.64]\n {}\n LDG.E R5, desc[UR4][R2.64]"
    assert sass.in_flight(parse(twice.format("NOP"))) == 1
    assert sass.in_flight(parse(twice.format("IADD3 R2, P0, R2, R6, RZ"))) == 2
    assert sass.in_flight(parse(twice.format("FADD R0, R4, R0"))) == 1


def loops(text):
    return [(sorted(loop.blocks), loop.in_flight) for loop in sass.loops(parse(text))]


def test_a_load_of_one_round_may_be_used_in_the_next():
    (loop,) = loops(
        """MOV R4, RZ
        FADD R0, R0, R4
        LDG.E R4, desc[UR4][R2.64]
        LDG.E R5, desc[UR4][R6.64]
        IADD3 R2, P0, R2, 0x4, RZ
        FADD R0, R0, R8
        LDG.E R8, desc[UR4][R2.64]
        @P0 BRA 0x10
        EXIT"""
    )
    assert loop == ([0x10], 3)


def test_loops_are_found_inside_one_another():
    assert loops(
        """MOV R4, RZ
        LDG.E R4, desc[UR4][R2.64]
        LDG.E R5, desc[UR4][R6.64]
        FADD R0, R0, R5
        @P0 BRA 0x20
        @P1 BRA 0x10
        EXIT"""
    ) == [([0x10, 0x20, 0x50], 2), ([0x20], 1)]


@pytest.mark.parametrize("branch", ["@P0 BRA 0x40", "BRA P0, 0x40", "BRA.DIV UR4, 0x40"])
def test_a_branch_back_from_code_that_lies_apart_is_no_loop(branch):
    assert not loops(
        f"MOV R4, RZ\n {branch}\n FADD R0, R0, R4\n EXIT\n LDG.E R4, desc[UR4][R2.64]\n BRA 0x20"
    )


@pytest.mark.parametrize("branch", ["@P0 BRA 0x40", "BRA P0, 0x40", "BRA.DIV UR4, 0x40"])
def test_what_follows_a_conditional_branch_is_reached(branch):
    loop = f"{branch}\n LDG.E R4, desc[UR4][R2.64]\n @P0 BRA 0x10\n EXIT\n EXIT"
    assert loops(loop) == [([0x10], 1)]
    assert not loops(loop.replace(branch, "BRA 0x40"))


def test_code_that_lies_apart_belongs_to_its_loop():
    assert loops(
        """LDG.E R4, desc[UR4][R2.64]
        @P1 BRA 0x50
        FADD R0, R0, R4
        @P0 BRA 0x0
        EXIT
        LDG.E R5, desc[UR4][R6.64]
        BRA 0x20
        BRA 0x70"""
    ) == [([0x0, 0x20, 0x50], 2)]


def test_a_table_of_branches_leads_into_loops():
    assert loops(
        """MOV R0, RZ
        BRX R2 -0x10
        FADD R0, R0, R1
        BRA 0x60
        FADD R0, R0, R3
        NOP
        @P0 BRA 0x10
        EXIT"""
    ) == [([0x10, 0x20, 0x40, 0x60], 0)]
