"""What mkdocs.yml cannot say: the navigation, the pages that are made from other files, and mathematics.

- Every page in docs/ and docs/api/ is in the navigation, those named here first.
- The home page is README.md, and the command line's page is what its `--help` prints.
- A link to another file of the repository leads to a page with that file, and `[file.py::name](file.py)` to the line
  where the name is defined. On GitHub it leads to the file.
- LaTeX becomes MathML, which browsers render by themselves.

tests/test_documentation.py reads `definitions` where mkdocs is not installed.
"""

import ast
import html
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("guide", "derivation", "results", "conformance", "architecture", "performance")
API_PAGES = (
    "diffusion",
    "unet",
    "samplers",
    "schedules",
    "noise",
    "likelihood",
    "ops",
    "optimize",
    "training",
    "conformance",
)
COMMAND_LINE = "api/command_line.md"

LINK = re.compile(r"\[(?P<text>[^]\n]*)\]\((?P<path>[^)#\s:]+)(?P<fragment>#[^)\s]*)?\)")
MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
SOURCE_LINK = re.compile(r'(<a href="[^"]+\.py\.html)("><code>([\w/]+\.py)::([\w.]+)</code>)')
TAG = re.compile(r"\\tag\{(.*?)\}")

# From a page's name in the site to the file of the repository that its text comes from.
_origins: dict[str, str] = {}


def on_config(config: Any) -> None:
    api = [*_ordered("docs/api", API_PAGES), COMMAND_LINE]
    config.nav = [{"Home": "index.md"}, *_ordered("docs", PAGES), {"API reference": api}]


def _ordered(folder: str, first: tuple[str, ...]) -> list[str]:
    """The pages of a folder, from docs/: those named first, then the others by name."""
    found = sorted(path.stem for path in (ROOT / folder).glob("*.md"))
    names = [*(name for name in first if name in found), *(name for name in found if name not in first)]
    return [posixpath.relpath(f"{folder}/{name}.md", "docs") for name in names]


def on_files(files: Any, config: Any) -> None:
    """Adds the pages that are made from other files."""
    from mkdocs.structure.files import File

    _origins.clear()
    _origins.update({page.src_uri: f"docs/{page.src_uri}" for page in files.documentation_pages()})
    _origins["index.md"] = "README.md"
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text()))
    files.append(File.generated(config, COMMAND_LINE, content=_command_line()))
    waiting = list(_origins.values())
    for path in waiting:
        for linked in _links(path):
            name = f"source/{linked}" if linked.endswith(".md") else f"source/{linked}.md"
            if linked not in _origins.values() and not linked.startswith("docs/") and (ROOT / linked).is_file():
                _origins[name] = linked
                files.append(File.generated(config, name, content=_source_page(linked)))
                waiting.append(linked)


def _links(path: str) -> Iterator[str]:
    """The files of the repository to which a page links."""
    if path.endswith(".md"):
        for match in LINK.finditer((ROOT / path).read_text()):
            yield _resolved(path, match["path"])


def _resolved(path: str, link: str) -> str:
    """The file that a link in another file leads to; of a folder its README.md."""
    linked = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    return f"{linked}/README.md" if (ROOT / linked).is_dir() else linked


def _source_page(path: str) -> str:
    text = (ROOT / path).read_text()
    if path.endswith(".md"):
        return text
    fence = "`" * 12
    return f'---\nhide: [toc]\nsearch: {{exclude: true}}\n---\n# {path}\n\n{fence}python linenums="1"\n{text}{fence}\n'


def _command_line() -> str:
    from ddpm_fast.app.cli import _parser

    parser = _parser()
    (commands,) = (action.choices for action in parser._actions if isinstance(action.choices, dict))
    with patch.dict(os.environ, COLUMNS="96"):
        texts = [f"## ddpm-fast {name}\n\n```text\n{command.format_help()}```\n" for name, command in commands.items()]
        return "\n".join([f"# Command line\n\n```text\n{parser.format_help()}```\n", *texts])


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between files of the repository become links between pages."""
    here = page.file.src_uri
    origin = _origins.get(here, f"docs/{here}")
    if not origin.endswith(".md"):
        return markdown
    names = {path: name for name, path in _origins.items()}

    def replaced(match: re.Match[str]) -> str:
        path = _resolved(origin, match["path"])
        name = names.get(path) or (path.removeprefix("docs/") if (ROOT / path).is_file() else None)
        if name is None:
            return match[0]
        fragment = match["fragment"] or ""
        return f"[{match['text']}]({posixpath.relpath(name, posixpath.dirname(here))}{fragment})"

    return LINK.sub(replaced, markdown)


def definitions(path: str) -> dict[str, int]:
    """The lines of the functions and classes of a Python file, by their names: `f`, `Class` and `Class.method`."""
    found = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                found[prefix + child.name] = child.lineno
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse((ROOT / path).read_text()), "")
    return found


def on_page_content(content: str, **_: Any) -> str:
    return _with_mathml(SOURCE_LINK.sub(lambda m: f"{m[1]}#__codelineno-0-{definitions(m[3])[m[4]]}{m[2]}", content))


def _with_mathml(content: str) -> str:
    """LaTeX to MathML; a displayed equation has its \\tag at the right and an id."""
    from math_core import LatexToMathML

    converter = LatexToMathML(annotation=True, fancy_error=False)

    def replaced(match: re.Match[str]) -> str:
        latex = html.unescape(match[2])
        if match[1] == "span":
            return converter.convert_with_local_state(latex, displaystyle=False)
        tag = TAG.search(latex)
        equation = converter.convert_with_local_state(TAG.sub("", latex), displaystyle=True)
        if tag is None:
            return f'<div class="equation">{equation}</div>'
        return f'<div class="equation" id="{tag[1]}">{equation}<span>({tag[1]})</span></div>'

    return MATH.sub(replaced, content)
