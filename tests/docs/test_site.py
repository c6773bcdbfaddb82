"""The site is built without a warning, and has every public name."""

import ast
import html
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # all pages and notebooks are built

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ssm_jax"


def build(folder):
    """Builds the site as `make docs` does."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", "docs", "-d", folder / "doctrees"]
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(
        [*command, ".", folder / "html"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "html"


def public_names():
    """Functions and classes by all names that they are documented by, where the package of a module hands it on too."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        handed_on = (path.parent / "__init__.py").read_text()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                names = [f"{module}.{node.name}"]
                if f"from {module} import {node.name} as {node.name}\n" in handed_on:
                    names.append(f"{module.rpartition('.')[0]}.{node.name}")
                yield names


def pages(site):
    """Those of the reference: the article of each, and its text outside of blocks of code."""
    for path in sorted((ROOT / "docs" / "api").glob("*.rst")):
        page = (site / "docs" / "api" / f"{path.stem}.html").read_text()
        article = re.search(r"<article.*</article>", page, re.DOTALL)[0]
        yield article, shown(re.sub(r"<pre>.*?</pre>", "", article, flags=re.DOTALL))


def shown(markup):
    return html.unescape(re.sub(r"<[^>]+>", "", markup))


def test_the_site_is_built_without_a_warning_and_whole(tmp_path):
    """One test, as the site takes half a minute."""
    site = build(tmp_path)

    _, _, _, _, packed = (site / "objects.inv").read_bytes().split(b"\n", 4)
    documented = set(re.findall(r"^(\S+) py:", zlib.decompress(packed).decode(), re.MULTILINE))
    assert len(documented) > 500
    assert [names for names in public_names() if documented.isdisjoint(names)] == []

    (start,) = re.findall(r'url=(\S+)"', (site / "index.html").read_text())
    assert (site / start).is_file()
    sources = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    assert len(sources) > 10
    assert [path for path in sources if not (site / path.relative_to(ROOT)).with_suffix(".html").is_file()] == []

    # Nothing of what docstrings mark is left as it is typed, and no name is private or an address.
    typed = ("`", "Args:", "jaxlib", "<function", " at 0x", "Alias for field")
    reference = [*pages(site)]
    assert [mark for _, text in reference for mark in typed if mark in text] == []
    assert not any("<p>* " in article or "problematic" in article for article, _ in reference)
    texts = "".join(shown(article) for article, _ in reference)
    assert "Float[Array, 'batch *axes features']" in texts
    assert re.search(r"y = conv\(u, kappa_1 .*\nout = GLU\(", texts)  # equations keep their lines
