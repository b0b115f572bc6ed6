"""SASS: its loops, and the global loads (LDG) that are in flight in them and hide one another's latency.

A load is in flight from its instruction to the first one, in the order of addresses, that names a register which
it or a later load writes (loads return in order, about).  A load from an address that another one in flight reads
does not count; the loads of all branches do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

MEMORY_OPCODES = frozenset({"LDG", "STG", "LDS", "STS", "LDL", "STL", "LDGSTS"})
_ACCESS_BYTES = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_INDIRECT = ("BRX", "BRXU", "JMX", "JMXU")
_END_OF_BLOCK = ("BRA", "EXIT", "RET", *_INDIRECT)
_LINE = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:\{\s*)?(?P<predicate>@!?U?P[T\d]+\s+)?"
    r"(?P<opcode>[A-Z][A-Z0-9]*)(?P<modifiers>(?:\.[A-Z0-9_]+)*)(?P<operands>[^;]*)"
)
_REGISTER = re.compile(r"(?<![A-Z])R(\d+)(\.64)?")
_BRACKETS = re.compile(r"\[[^]]*\]")
_TARGET = re.compile(r"0x([0-9a-f]+)$")


@dataclass(frozen=True)
class Instruction:
    """One instruction."""

    address: int
    predicated: bool
    opcode: str
    modifiers: tuple[str, ...]
    operands: str

    @property
    def size(self) -> int:
        """Bytes that a memory instruction moves a thread."""
        sizes = [_ACCESS_BYTES[modifier] for modifier in self.modifiers if modifier in _ACCESS_BYTES]
        return sizes[-1] if sizes else 4

    @property
    def is_load(self) -> bool:
        """A load from global memory into registers."""
        return self.opcode == "LDG"

    @property
    def source(self) -> str:
        """All operands but the first: the address of a load."""
        return self.operands.partition(",")[2]

    @cached_property
    def written(self) -> frozenset[int]:
        """Numbers of the registers of its first operand, which is the result if it has one."""
        return _registers(_BRACKETS.sub("", self.operands.partition(",")[0]), self._width)

    @cached_property
    def named(self) -> frozenset[int]:
        """Numbers of all registers that it reads or writes."""
        return _registers(_BRACKETS.sub("", self.operands), self._width) | self.of_addresses

    @cached_property
    def of_addresses(self) -> frozenset[int]:
        """Numbers of the registers in brackets."""
        return _registers(" ".join(_BRACKETS.findall(self.operands)), 1)

    @property
    def _width(self) -> int:
        return max(self.size // 4, 1) if self.opcode in MEMORY_OPCODES else 1

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        match = _TARGET.search(self.operands)
        return int(match[1], 16) if match and self.opcode == "BRA" else None


@dataclass(frozen=True)
class Loop:
    """A natural loop, inner ones included: the addresses of its blocks, its LDGs, and how many are in flight."""

    blocks: frozenset[int]
    loads: tuple[Instruction, ...]
    in_flight: int

    @property
    def first(self) -> int:
        """The lowest address."""
        return min(self.blocks)


def _registers(operands: str, width: int) -> frozenset[int]:
    """Numbers of the registers in these operands, each the first of ``width``, or of two if it says so."""
    numbers = [(int(match[1]), 2 if match[2] else width) for match in _REGISTER.finditer(operands)]
    return frozenset(first + i for first, count in numbers for i in range(count))


def parse(sass: str) -> list[Instruction]:
    """The instructions of one kernel."""
    return [
        Instruction(
            address=int(match["address"], 16),
            predicated=match["predicate"] is not None,
            opcode=match["opcode"],
            modifiers=tuple(match["modifiers"].split(".")[1:]),
            operands=match["operands"].strip(),
        )
        for match in _LINE.finditer(sass)
    ]


def in_flight(instructions: Iterable[Instruction]) -> int:
    """The most global loads in flight at a time, if the instructions are executed one after the other."""
    waiting: list[Instruction] = []
    # Addresses, as text, from which loads in flight read, and their registers, as long as these stay the same.
    places: dict[str, frozenset[int]] = {}
    most = 0
    for instruction in instructions:
        used = [number for number, load in enumerate(waiting) if load.written & instruction.named]
        if used:
            del waiting[: used[-1] + 1]
            places = {load.source: load.of_addresses for load in waiting if load.source in places}
        if instruction.is_load and instruction.source not in places:
            waiting.append(instruction)
            places[instruction.source] = instruction.of_addresses
            most = max(most, len(waiting))
        places = {place: of for place, of in places.items() if not of & instruction.written}
    return most


def in_flight_in_loops(instructions: list[Instruction]) -> int:
    """The loads in flight on which a kernel's time depends, as one number.

    It is that of a loop with the widest loads of all loops and without such a loop inside.  Between one barrier and
    the next the one with the most counts, since others are its remainder or its variants, and of these the one with
    the fewest.  In a kernel without loads in loops, it is the most in flight anywhere.
    """
    loading = loops(instructions)
    widest = max((load.size for loop in loading for load in loop.loads), default=0)
    wide = [loop for loop in loading if any(load.size == widest for load in loop.loads)]
    inner = [loop for loop in wide if not any(other.blocks < loop.blocks for other in wide)]
    barriers = [instruction.address for instruction in instructions if instruction.opcode == "BAR"]
    most: dict[int, int] = {}
    for loop in inner:
        passed = sum(address < loop.first for address in barriers)
        most[passed] = max(most.get(passed, 0), loop.in_flight)
    return min(most.values(), default=in_flight(instructions))


def loops(instructions: list[Instruction]) -> list[Loop]:
    """The loops of a kernel: branches back to a block that dominates them, and all that leads to them from there."""
    blocks = _blocks(instructions)
    successors = _successors(blocks)
    reached = sorted(_reached(0, successors))
    predecessors: list[set[int]] = [set() for _ in blocks]
    for block in reached:
        for successor in successors[block]:
            predecessors[successor].add(block)
    dominators = _dominators(predecessors)
    bodies: dict[int, set[int]] = {}
    for block in reached:
        for head in successors[block]:
            if dominators[block] >> head & 1:
                bodies.setdefault(head, set()).update(_reached(block, predecessors, {head}))
    found = []
    for _, body in sorted(bodies.items()):
        once = [instruction for block in sorted(body) for instruction in blocks[block]]
        loads = tuple(instruction for instruction in once if instruction.is_load)
        # Twice, since what is loaded at the end of the body may be used at its beginning.
        addresses = frozenset(blocks[block][0].address for block in body)
        found.append(Loop(addresses, loads, in_flight(once * 2)))
    return found


def _blocks(instructions: list[Instruction]) -> list[list[Instruction]]:
    """Basic blocks in the order of addresses."""
    targets = {instruction.target for instruction in instructions}
    blocks: list[list[Instruction]] = []
    for instruction in instructions:
        if not blocks or instruction.address in targets or blocks[-1][-1].opcode in _END_OF_BLOCK:
            blocks.append([])
        blocks[-1].append(instruction)
    return blocks


def _successors(blocks: list[list[Instruction]]) -> list[set[int]]:
    """The numbers of the blocks that may follow each."""
    number_of = {block[0].address: number for number, block in enumerate(blocks)}
    successors: list[set[int]] = [set() for _ in blocks]
    for number, block in enumerate(blocks):
        last = block[-1]
        if last.target in number_of:
            successors[number].add(number_of[last.target])
        # BRA P0, target and BRA.DIV UR4, target are conditional as well.
        conditional = last.predicated or (last.opcode == "BRA" and "," in last.operands)
        if (conditional or last.opcode not in _END_OF_BLOCK) and number + 1 < len(blocks):
            successors[number].add(number + 1)
    # Tables of branches are not in the text: they are taken to lead wherever nothing else does.
    others = set(range(1, len(blocks))).difference(*successors)
    for block, following in zip(blocks, successors, strict=True):
        if block[-1].opcode in _INDIRECT:
            following |= others
    return successors


def _dominators(predecessors: list[set[int]]) -> list[int]:
    """For each block, those on every way to it from the first, itself included, as bits."""
    everything = (1 << len(predecessors)) - 1
    dominators = [1] + [everything] * (len(predecessors) - 1)
    changed = True
    while changed:
        changed = False
        for block in range(1, len(predecessors)):
            common = everything
            for predecessor in predecessors[block]:
                common &= dominators[predecessor]
            common |= 1 << block
            if common != dominators[block]:
                dominators[block], changed = common, True
    return dominators


def _reached(block: int, following: list[set[int]], known: Iterable[int] = ()) -> set[int]:
    """The blocks that are reached from one by these edges, itself included, without passing the known ones."""
    found, rest = set(known), [block]
    while rest:
        block = rest.pop()
        if block not in found:
            found.add(block)
            rest.extend(following[block])
    return found
