"""The site: `make docs`, or `python -m sphinx -c docs . build/docs`.

Its source is the repository, so that links between README.md, pages, notebooks and files are the same here and where
they are read as plain Markdown.
"""

import ast
import builtins
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from docutils import nodes
from flax import nnx
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.inspect import safe_getattr

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

project = "ssm_jax"
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**", "notebooks/*.ipynb"]
exclude_patterns = ["build", "runs", ".*"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]
nb_execution_mode = "off"  # tests run them, and what they gave is committed
highlight_language = "text"

autoclass_content = "both"
autodoc_default_options = {"members": True, "member-order": "bysource", "special-members": "__call__"}
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
napoleon_use_ivar = True
napoleon_attr_annotations = False
default_role = "py:obj"
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = "ssm_jax"
html_extra_path = ["site"]
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_show_copyright = html_show_sphinx = False


class Package(SphinxDirective):
    """`.. package:: NAME`: what a package or module says of itself, and each of its public names with its docstring.

    Names that a package hands on come first, by the shorter name; then what else its modules have.
    """

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Nodes of sections and autodoc's."""
        package = importlib.import_module(self.arguments[0])
        lines = [*rest(inspect.getdoc(package) or ""), ""]
        handed_on = {}
        if hasattr(package, "__path__"):
            handed_on = dict(imported(package))
            lines += directives(package, [*handed_on, *public(package)])
            for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
                module = importlib.import_module(found.name)
                names = [name for name in public(module) if handed_on.get(name) != found.name]
                if names:
                    lines += [found.name, "-" * len(found.name), "", *rest(inspect.getdoc(module) or ""), ""]
                    lines += directives(module, names)
        else:
            lines += directives(package, [*public(package)])
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def imported(package: ModuleType) -> Iterator[tuple[str, str | None]]:
    """Names that a package hands on (`from MODULE import NAME as NAME`), and whose they are."""
    for node in ast.parse(inspect.getsource(package)).body:
        if isinstance(node, ast.ImportFrom):
            yield from ((alias.name, node.module) for alias in node.names if alias.asname == alias.name)


def public(module: ModuleType) -> Iterator[str]:
    """Names of functions, classes, and values with a docstring, that a module defines."""
    body = ast.parse(inspect.getsource(module)).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        match node:
            case ast.FunctionDef(name) | ast.ClassDef(name):
                names = [name]
            case ast.Assign(targets) if documented:
                names = [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
            case ast.AnnAssign(ast.Name(name)) if documented:
                names = [name]
            case _:
                continue
        yield from (name for name in names if not name.startswith("_"))


def directives(module: ModuleType, names: list[str]) -> Iterator[str]:
    """Those of autodoc for names of a module."""
    for name in names:
        value = getattr(module, name)
        kind = "class" if inspect.isclass(value) else "function" if inspect.isroutine(value) else "data"
        yield f".. auto{kind}:: {module.__name__}::{name}"
        if kind == "data" and "<" in repr(value):  # functions and classes, which are not written as they are read
            yield "   :no-value:"
        yield ""


def rest(docstring: str) -> Iterator[str]:
    """Docstrings are Markdown with Google's sections: as what Sphinx reads."""
    fenced = indented = False
    before = last = ""
    docstring = re.sub(r"```.*?```|`[^`]+`", _on_one_line, docstring, flags=re.DOTALL)
    for line in docstring.splitlines():
        if line.strip().startswith("```"):
            fenced = not fenced
            yield line.replace("```python", ".. code-block:: python\n").replace("```", "")
        elif fenced:
            yield f"    {line}"
        else:
            indented = line.startswith("    ") and (indented or (not before and last[:1] not in ("", " ", "*")))
            if indented or not line:
                if indented and not before and not last.startswith(" "):
                    yield from ("::", "")
                yield line
            else:
                yield inline(line)
            before, last = line, line or last


def _on_one_line(code: re.Match[str]) -> str:
    return code[0] if code[0].startswith("```") else re.sub(r"\s*\n\s*", " ", code[0])


def inline(line: str) -> str:
    """Code that is a name becomes a link where there is one; reST's marks in prose are characters."""
    text = re.sub(r"^\s*\* ", "", line)
    bullet = line.removesuffix(text)
    parts = re.split(r"(`[^`]*`)", text)
    for i, part in enumerate(parts):
        if i % 2 == 0:
            part = re.sub(r"([*|\\`]|_\b)", r"\\\1", part)
            part = re.sub(r"^(?=[\w^])", r"\\ ", part) if i > 0 else part  # as in `name`s
            parts[i] = part
        elif not re.fullmatch(r"`[A-Za-z_][\w.]*`", part):
            parts[i] = f"`{part}`"
    return bullet + "".join(parts)


def read_docstring(app, what, name, obj, options, lines):
    """Before napoleon does. What Python says of every NamedTuple is left out."""
    said = re.compile("Create new instance of |Alias for field number ")
    lines[:] = "\n".join(rest("\n".join(line for line in lines if not said.match(line)))).splitlines()
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]  # of a first line napoleon takes what comes before a colon for a type


def read_signature(app, what, name, obj, options, signature, returns):
    """A name for what `jax.typing.DTypeLike` is."""
    dtype = "str | type[~typing.Any] | ~numpy.dtype | ~jax._src.typing.SupportsDType"
    return signature and signature.replace(dtype, "~jax.typing.DTypeLike"), returns


def get_attribute(obj, name, *default):
    """A module is made as its `__init__` says; what Flax's metaclass takes is anything."""
    return None if (obj, name) == (type(nnx.Module), "__call__") else safe_getattr(obj, name, *default)


def read_document(app, doctree):
    """`bytes` in a signature is no attribute of that name, and shapes are of an `Array`, whose full name is private."""
    for reference in list(doctree.findall(addnodes.pending_xref)):
        if hasattr(builtins, reference.get("reftarget", "")):
            reference.replace_self(reference.children)
    for text in list(doctree.findall(nodes.Text)):
        if "jaxlib._jax.Array" in text:
            text.parent.replace(text, nodes.Text(text.replace("jaxlib._jax.Array", "Array")))


def setup(app: Sphinx) -> None:
    """What Sphinx calls."""
    app.add_directive("package", Package)
    app.add_autodoc_attrgetter(type, get_attribute)
    app.connect("autodoc-process-docstring", read_docstring, priority=400)
    app.connect("autodoc-process-signature", read_signature)
    app.connect("doctree-read", read_document)
