"""Links of README.md, the pages and the notebooks lead to files and headings that exist, where GitHub shows them."""

import itertools
import re
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("notebooks/*.ipynb"))]


def parsed(path):
    """Tokens of a page, or of the text of a notebook."""
    text = path.read_text()
    if path.suffix == ".ipynb":
        notebook = nbformat.reads(text, as_version=4)
        text = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return MarkdownIt("commonmark").enable("table").parse(text)


def links(path):
    for token in parsed(path):
        for part in token.children or ():
            if part.type == "link_open":
                yield unquote(part.attrs["href"])
            elif part.type == "image":
                yield unquote(part.attrs["src"])


def anchors(path):
    """Of headings, as GitHub makes them."""
    tokens = parsed(path)
    seen = Counter()
    for opening, heading in itertools.pairwise(tokens):
        if opening.type == "heading_open":
            text = "".join(part.content for part in heading.children if part.type in ("text", "code_inline"))
            name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            yield f"{name}-{seen[name]}" if seen[name] else name
            seen[name] += 1


def broken(path):
    """Links that lead nowhere. Those of the internet are not followed."""
    for link in links(path):
        if re.match(r"https?://", link):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        inside = file.is_relative_to(ROOT) and file.exists()
        if not inside or (anchor and (file.suffix != ".md" or anchor not in anchors(file))):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    assert [*broken(page)] == []


def test_broken_links_are_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "there.md").write_text("# A `code` heading, with more\n\n# Twice\n\n# Twice\n")
    page = tmp_path / "page.md"
    good = ["there.md", "there.md#a-code-heading-with-more", "there.md#twice-1", "#here", "https://example.org/nowhere"]
    bad = ["gone.md", "there.md#gone", "there.md#twice-2", "#there", "../outside.md", "gone.png"]
    page.write_text("# Here\n\n" + "\n".join(f"[a]({link})" for link in [*good, *bad[:-1]]) + f"\n![b]({bad[-1]})\n")
    assert [*links(page)] == [*good, *bad]
    assert [*broken(page)] == bad


def test_pages_have_links():
    counts = {page.name: sum(1 for _ in links(page)) for page in PAGES}
    assert min(counts["README.md"], counts["pods.md"], counts["index.md"]) > 5
