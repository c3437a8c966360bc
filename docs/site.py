"""What GitHub shows and mkdocs does not: the README as first page, the notebook, links to source files, mathematics.

mkdocs calls the `on_` functions (`hooks` in mkdocs.yml). The README and docs/*.md hold links as GitHub follows them,
from file to file in the repository; here they are turned to where each file stands on the site. A file that is no page
becomes one, `source/PATH`, if a page links to it. Mathematics becomes MathML, which browsers draw themselves.
"""

import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any
from urllib.parse import unquote

import nbformat
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[1]
README, NOTEBOOK = "README.md", "docs/walkthrough.ipynb"
MOVED = {README: "index.md", NOTEBOOK: "walkthrough.md"}
FIRST = ("index.md", "walkthrough.md", "results.md", "paper-and-code.md", "reproduce.md")
"""What leads the list of pages; the others follow by name, the tables last."""
SHORT = {
    "walkthrough.md": "The lesson",
    "paper-and-code.md": "Paper and code",
    "reproduce.md": "Reproduce",
    "cli.md": "Command and Python",
    "limits.md": "Limits",
    "open-questions.md": "Open questions",
    "performance-details.md": "Performance details",
    "tables/gpu.md": "One run on a GPU",
    "tables/miniature.md": "Miniature",
    "tables/precision.md": "Precision",
    "tables/smollm2.md": "SmolLM2",
}
"""Pages whose own titles are too long for the list."""
LINK = re.compile(r'(\]\(|\bsrc=")(?!\w+:)([^)"#\s]*)(#[^)"\s]*)?')
"""What stands before a relative target in Markdown or HTML, the file, the anchor."""
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
PICTURE = re.compile(r'(<img\b[^>]*\bsrc="(?!\w+:)([^"]+)"[^>]*>)')


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Without 404.html, whose links need a server."""
    config.theme.static_templates.discard("404.html")
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the README, the notebook, and every file that a page links to; put the pages in order."""
    overview = "---\ntitle: Overview\n---\n" + (ROOT / README).read_text(encoding="utf-8")
    for name, content in [(place(README), overview), *notebook()]:
        files.append(File.generated(config, name, content=content))
    pages = list(files.documentation_pages())
    for page in pages:  # grows: a page that is added may link to others
        for path in linked(page):
            if is_source(path) and files.get_file_from_path(place(path)) is None:
                pages.append(source_page(config, path))
                files.append(pages[-1])
    config.nav = navigation([page.src_uri for page in pages if not page.src_uri.startswith("source/")])
    return files


def navigation(pages: list[str]) -> list[Any]:
    """The list of pages beside each page, under short titles."""
    tables = sorted(page for page in pages if page.startswith("tables/"))
    others = sorted({*pages} - {*FIRST, *tables}, key=lambda page: page.removesuffix(".md"))
    return [*map(titled, [*FIRST, *others])] + ([{"Tables": [*map(titled, tables)]}] if tables else [])


def titled(page: str) -> str | dict[str, str]:
    return {SHORT[page]: page} if page in SHORT else page


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links as they are on the site, and Markdown inside <details>."""
    turned = LINK.sub(lambda found: turn(page.file, *found.groups("")), markdown)
    return turned.replace("<details>", '<details markdown="1">')


def on_page_content(html: str, **_: Any) -> str:
    """Formulas as MathML; formulas and pictures in boxes that scroll; each picture leads to itself, to be enlarged."""
    html = FORMULA.sub(lambda found: mathml(found[2], "inline" if found[1] == "span" else "block"), html)
    return PICTURE.sub(r'<a class="picture" href="\2" title="Enlarge">\1</a>', html)


def mathml(formula: str, display: str) -> str:
    math = convert(unescape(formula).replace("{aligned}", "{align*}"), display=display)
    return math if display == "inline" else f'<div class="formula">{math}</div>'


# --- pages ----------------------------------------------------------------------------------------


def notebook() -> Iterator[tuple[str, str | bytes]]:
    """The notebook as a page with its stored outputs, and its pictures; what stands for each, nbconvert leaves out."""
    lesson = nbformat.read(ROOT / NOTEBOOK, as_version=4)
    names = {"unique_key": "walkthrough", "output_files_dir": "walkthrough"}
    page, found = MarkdownExporter().from_notebook_node(lesson, names)
    outputs = (output for cell in lesson.cells for output in cell.get("outputs", []))
    instead = (output.metadata["image/png"]["alt"] for output in outputs if "image/png" in output.get("data", {}))
    yield place(NOTEBOOK), re.sub(r"(?<=!\[)png(?=\])", lambda _: next(instead), page)
    yield from found["outputs"].items()


def source_page(config: MkDocsConfig, path: str) -> File:
    """A file of the repository with its colours, or the names in a folder."""
    there = ROOT / path
    if there.is_dir():
        lines = [f"- [{each.name}]({there.name}/{each.name})" for each in sorted(there.iterdir()) if each.suffix]
        body = f"# {path}\n\n" + "\n".join(lines)
    elif there.suffix == ".md":
        body = there.read_text(encoding="utf-8")
    else:
        body = f"---\nhide: [toc]\n---\n# {path}\n\n````{there.suffix[1:]}\n{there.read_text(encoding='utf-8')}\n````"
    page = File.generated(config, place(path), content=body)
    page.inclusion = InclusionLevel.NOT_IN_NAV
    return page


# --- links ----------------------------------------------------------------------------------------


def is_source(path: str) -> bool:
    """Whether a file of the repository is a page only because one links to it."""
    return path != README and (not path.startswith("docs/") or path.endswith(".py"))


def place(path: str) -> str:
    """Where a file of the repository stands on the site."""
    if is_source(path):
        return f"source/{path.removesuffix('.md')}.md"
    return MOVED.get(path, path.removeprefix("docs/"))


def origin(uri: str) -> str:
    """The file of the repository that stands there."""
    if uri.startswith("source/"):
        path = uri.removeprefix("source/")
        return path if (ROOT / path).exists() else path.removesuffix(".md")
    return next((path for path, moved in MOVED.items() if moved == uri), f"docs/{uri}")


def resolve(page: File, target: str) -> str | None:
    """The file of the repository that a page's link leads to, if there is one; code has no links."""
    here = origin(page.src_uri)
    path = normpath(join(dirname(here), target))
    return path if target and not here.endswith(".py") and (ROOT / path).exists() else None


def linked(page: File) -> Iterator[str]:
    """The files of the repository that a page links to."""
    return filter(None, (resolve(page, target) for _, target, _ in LINK.findall(page.content_string)))


def turn(page: File, before: str, target: str, anchor: str) -> str:
    """A link of the repository as one of the site; what leads to no file stays what it is."""
    if anchor and page.src_uri == MOVED[NOTEBOOK]:  # Jupyter's anchors are the headings with hyphens for spaces
        anchor = "#" + slugify(case="lower")(unquote(anchor[1:]).replace("-", " "), "-")
    path = resolve(page, target)
    return before + (relpath(place(path), dirname(page.src_uri) or ".") if path else target) + anchor
