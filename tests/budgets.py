"""What a kernel may use of the machine: budgets.toml, and the comparison with what the compilers make today.

A test that measures kernels calls `settle`, which fails where something has become worse; to accept it, or to keep what
has become better, `pytest --update-budgets` writes the file anew.
"""

import sys
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from ptxsim import static, toolchain

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings along there

BUDGETS = Path(__file__).with_name("budgets.toml")
HEADER = """\
# What each kernel uses: registers, spilled bytes, 128-bit loads and stores, bytes of static shared memory, and SASS
# instructions, all that there are (of every branch) and that number for each element of a thread's tile.
# in_flight: global loads that are issued before a register that one of them writes is used, in the inner loop with the
# widest loads. Where barriers part such loops, that of the part with the fewest; without loops, of the whole kernel.
# Written by `pytest --update-budgets`; tests fail where a number has become worse.
"""
MORE_IS_BETTER = ("loads_128", "stores_128", "in_flight")

Row = Mapping[str, float]


def most_of_a_reverse_step(arch: int, dtype: str) -> int:
    """How many instructions an element it may take with its noise, for a state of a dtype.

    Turing cannot convert to bfloat16: rounding takes some 14 integer instructions there, where others have one for two
    elements.
    """
    return 72 if arch < 80 and dtype == "bfloat16" else 60


def measure(report: static.KernelReport, elements: int | None = None) -> Row:
    """A kernel's row. `elements`: in a thread's tile."""
    padding = report.instructions["NOP"]
    row = {
        "registers": report.registers,
        "spills": report.spill_store_bytes + report.spill_load_bytes + report.local_array_bytes,
        "loads_128": report.wide_loads,
        "stores_128": report.wide_stores,
        "in_flight": report.loads_in_flight,
        "shared": report.shared_bytes,
        "instructions": report.instructions.total() - padding,
    }
    return row | ({"per_element": round(row["instructions"] / elements, 1)} if elements else {})


def tools() -> dict[str, str]:
    """The versions of the compilers, on which the numbers depend."""
    triton = {"triton": version("triton")} if find_spec("triton") else {}
    return triton | {
        name: toolchain.run_tool([toolchain.find_tool(name), "--version"]).split("release ")[1].split(",")[0]
        for name in ("ptxas", "ptxas-blackwell")
        if toolchain.has_tool(name)
    }


def settle(section: str, rows: Mapping[str, Mapping[str, Row]], *, update: bool) -> None:
    """Compares kernel -> architecture -> row with a section of the file, or writes the section."""
    file = tomllib.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    if update:
        _write(file | {section: {"tools": tools(), **rows}})
        return
    known = dict(file.get(section, {}))
    measured_with = known.pop("tools", None)
    if section == "triton" and measured_with["triton"] != tools()["triton"]:
        pytest.skip(f"the budgets are those of Triton {measured_with['triton']}")
    # Other assemblers allocate and order otherwise: a tenth more, or another distance from loads to their use, is then
    # not this code's doing.
    same_tools = measured_with == tools()
    slack, ignored = (1.0, ()) if same_tools else (1.1, ("in_flight",))
    worse = [f"{name} is not in the file" for name in rows.keys() - known.keys()]
    worse += [f"{name} is no more" for name in known.keys() - rows.keys()]
    for name in rows.keys() & known.keys():
        for arch in rows[name]:
            budget, row = known[name].get(arch, {}), rows[name].get(arch, {})
            for what in (budget.keys() | row.keys()).difference(ignored):
                old, new = budget.get(what), row.get(what)
                if None in (old, new) or (new < old if what in MORE_IS_BETTER else new > old * slack):
                    worse.append(f"{name} {arch}: {what} was {old} and is {new}")
    assert not worse, "worse than tests/budgets.toml (pytest --update-budgets accepts it):\n" + "\n".join(sorted(worse))


def _write(file: Mapping[str, Mapping[str, Mapping[str, Row]]]) -> None:
    lines = [HEADER]
    for section, kernels in sorted(file.items()):
        for name, by_arch in sorted(kernels.items()):
            lines.append(f"[{section}.{name}]" if name == "tools" else f'[{section}."{name}"]')
            for arch, row in by_arch.items():
                if isinstance(row, str):
                    lines.append(f'{arch} = "{row}"')
                    continue
                cells = ", ".join(
                    f"{what} = {value:>{5 if what in ('instructions', 'shared') else 3}}" for what, value in row.items()
                )
                lines.append(f"{arch:<6} = {{ {cells} }}")
            lines.append("")
    BUDGETS.write_text("\n".join(lines))
