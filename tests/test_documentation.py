"""The documentation: its equations have code and tests, its Python runs, and it can be built as a site."""

import ast
import inspect
import os
import re
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import table_scheduler
import torch
from mkdocs_hooks import definitions
from small_diffusion import Net, images

import ddpm_fast
from ddpm_fast import (
    GaussianDiffusion,
    UNet,
    conformance,
    likelihood,
    loss_weights,
    noise,
    ops,
    parameterization,
    samplers,
    schedules,
    variances,
)

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


# Equations

DERIVATION = (ROOT / "docs/derivation.md").read_text()
# Every displayed equation, and the line below it
EQUATIONS = re.findall(r"^```math\n(.*?)^```\n\n(.*?)$", DERIVATION, re.MULTILINE | re.DOTALL)
TAG = re.compile(r"\\tag\{(.*?)\}")
TAGS = [tag for equation, _ in EQUATIONS for tag in TAG.findall(equation)]
LINKS = re.compile(r"code: (.+) · test: (.+)")
LINK = re.compile(r"\[`(.+)::(.+)`\]\(\.\./(.+)\)")


@pytest.mark.parametrize(("equation", "line"), EQUATIONS, ids=TAGS)
def test_an_equation_names_the_code_that_computes_it_and_the_tests_that_check_it(equation, line):
    links = LINKS.fullmatch(line)
    assert links, f"under the equation should be `code: ... · test: ...`; there is {line!r}"
    for folder, part in zip(("ddpm_fast/", "tests/"), links.groups(), strict=True):
        for written in part.split(", "):
            path, name, target = LINK.fullmatch(written).groups()
            assert path == target
            assert path.startswith(folder)
            assert name in definitions(path)
            assert folder == "ddpm_fast/" or name.startswith("test_")


def test_equations_and_sources_are_numbered_and_references_lead_to_one():
    assert len(EQUATIONS) == len(TAGS) == DERIVATION.count("```math")
    sections = [int(number) for number in re.findall(r"^## (\d+)\.", DERIVATION, re.MULTILINE)]
    assert sections == list(range(1, len(sections) + 1))
    expected, section, count = [], 0, 0
    for heading, tag in re.findall(r"^## (\d+)\.|\\tag\{(.*?)\}", DERIVATION, re.MULTILINE):
        section, count = (int(heading), 0) if heading else (section, count + 1)
        expected += [f"{section}.{count}"] if tag else []
    assert expected == TAGS
    assert set(re.findall(r"\((\d+\.\d+)\)", DERIVATION)) <= set(TAGS)
    sources = set(re.findall(r"^(\d+)\. ", DERIVATION.partition("## Sources")[2], re.MULTILINE))
    assert set(re.findall(r"\[(\d+)[],]", DERIVATION)) == sources


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_inline_mathematics_is_the_same_on_github(page):
    """GitHub reads Markdown first: a backslash before punctuation is lost, and _ after punctuation begins emphasis."""
    text = re.sub(r"^```.*?^```$|`[^`\n]+`", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for latex in re.findall(r"(?<!\$)\$(?!\$)([^$]+)\$", text):
        assert not re.search(r"\\[^A-Za-z ]|(?<![A-Za-z0-9])_|[*<\n]", latex), f"write ${latex}$ otherwise"


# Python

BLOCKS = [
    pytest.param(block, id=f"{page.name}-{i}")
    for page in PAGES
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL))
]
HERE = {"ddpm_fast", "torch"}  # what is there wherever the tests run


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("block", BLOCKS)
def test_python_in_the_documentation_runs(block, tmp_path, monkeypatch):
    """Blocks that import other packages are compiled alone. Networks are narrower and runs shorter than as written."""
    code = compile(block, "documentation", "exec")
    if not set(imported(ast.parse(block))) <= HERE:
        return
    monkeypatch.setattr(ddpm_fast, "GaussianDiffusion", partial(GaussianDiffusion, timesteps=60))
    monkeypatch.setattr(UNet, "preset", partial(UNet.preset, dim=4, norm_groups=4))
    registries = {loss_weights: "LOSS_WEIGHTS", parameterization: "OBJECTIVES", samplers: "SAMPLERS"}
    for module, name in (registries | {schedules: "SCHEDULES", variances: "VARIANCES"}).items():
        monkeypatch.setattr(module, name, dict(getattr(module, name)))
    monkeypatch.chdir(tmp_path)
    exec(code, {"__name__": "documentation", **what_the_text_names()})


def what_the_text_names():
    diffusion = GaussianDiffusion(Net(), image_size=(4, 6), rng="torch")
    mask = torch.arange(6) < 3
    return {"diffusion": diffusion, "images": images(), "mask": mask, "MyScheduler": table_scheduler.DDIM}


# The site


@pytest.mark.skipif(
    not all(map(find_spec, ("material", "math_core", "mkdocs", "mkdocstrings"))), reason='pip install ".[docs]"'
)
def test_the_site_builds_without_a_warning_and_has_every_public_name(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    built = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stderr
    derivation = (tmp_path / "derivation.html").read_text()
    assert derivation.count('<math display="block"') == len(EQUATIONS)
    assert "arithmatex" not in derivation
    assert derivation.count(".py.html#__codelineno-0-") == sum(line.count("](") for _, line in EQUATIONS)
    assert "Quick start" in (tmp_path / "index.html").read_text()
    assert "--resume" in (tmp_path / "api/command_line.html").read_text()
    for page in tmp_path.rglob("*.html"):  # nothing is fetched from the network
        assert not re.search(r'<(script|link|img|iframe)[^>]*(src|href)="?(https?:)?//', page.read_text()), page

    names = set()
    for page in (tmp_path / "api").glob("*.html"):
        names |= {name.rpartition(".")[2] for name in re.findall(r'id="(ddpm_fast[\w.]*)"', page.read_text())}
    for module in (ddpm_fast, conformance, likelihood, noise, ops, samplers, schedules):
        public = {name: getattr(module, name) for name in module.__all__}
        missing = {name for name, f in public.items() if inspect.isfunction(f) or inspect.isclass(f)} - names
        assert not missing, f"docs/api/ leaves out {missing} of {module.__name__}"
    missing = {f.__name__ for f in (*samplers.SAMPLERS.values(), *schedules.SCHEDULES.values())} - names
    assert not missing, f"docs/api/ leaves out the samplers or schedules {missing}"
