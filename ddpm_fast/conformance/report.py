"""What the kit found."""

__all__ = ["Finding", "Report"]

import math
from dataclasses import dataclass, field
from typing import Any

Figure = float | int | str | None


@dataclass(frozen=True)
class Finding:
    """One check.

    check: its name, such as "variance after K steps".
    status: "pass", "fail", or "not checked" (`detail` says why).
    found, expected, tolerance: figures; found must lie within tolerance of expected.
    steps: K of the run that the figures are from, if they are from one.
    detail: what the figures are of, in words.
    """

    check: str
    status: str
    found: Figure = None
    expected: Figure = None
    tolerance: Figure = None
    steps: int | None = None
    detail: str = ""

    @property
    def excess(self) -> float:
        """|found - expected| in units of the tolerance; infinite for what is not finite."""
        if not isinstance(self.found, int | float) or not isinstance(self.expected, int | float):
            return math.inf if self.status == "fail" else 0.0
        error = abs(self.found - self.expected)
        if math.isnan(error):
            return math.inf
        return error / self.tolerance if self.tolerance else (math.inf if error else 0.0)


@dataclass
class Report:
    """All findings about one sampler, in the order of the checks.

    name: of the class or function.
    facts: what was checked: T, the steps, what the class claims to be, its precision.
    """

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def failures(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.status == "fail"]

    def __getitem__(self, check: str) -> Finding:
        """The finding of a check by its name."""
        for finding in self.findings:
            if finding.check == check:
                return finding
        raise KeyError(f"no check {check!r}; there are {', '.join(f.check for f in self.findings)}")

    def markdown(self) -> str:
        """A heading, a line of facts and a table of the findings."""
        facts = "; ".join(f"{name} {value}" for name, value in self.facts.items())
        rows = [("check", "result", "K", "found", "expected", "tolerance", "")]
        rows += [
            (f.check, f.status, *map(_text, (f.steps, f.found, f.expected, f.tolerance)), f.detail)
            for f in self.findings
        ]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        lines.insert(1, "| --- | --- | --- | --- | --- | --- | --- |")
        return "\n".join([f"## {self.name}", "", facts, "", *lines])


def _text(figure: Figure) -> str:
    if figure is None:
        return ""
    return f"{figure:.5g}" if isinstance(figure, float) else str(figure)
