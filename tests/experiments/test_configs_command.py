"""`python -m experiments.configs`, and the page that it writes."""

import importlib
from pathlib import Path

import pytest

from experiments import configs

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def uncounted(monkeypatch):
    """Counting the parameters of all networks takes half a minute."""
    monkeypatch.setattr(configs, "count_parameters", lambda config: 0)


def cells(page):
    rows = [line.strip("|\n ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    return [[cell for i, cell in enumerate(row) if i != list(configs.COLUMNS).index("parameters")] for row in rows]


def test_the_page_of_recipes_is_what_the_command_writes(uncounted):
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert page.partition("| config")[0] == configs.markdown().partition("| config")[0]
    assert cells(page) == cells(configs.markdown())


def test_the_table_fits_a_terminal_and_breaks_no_name(uncounted, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    configs.print_table()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    first = {line.split()[0] for line in lines if line.split()}
    assert {recipe.name for recipe in configs.recipes()} <= first


def test_every_file_is_listed_unless_it_is_no_recipe():
    files = {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").glob("*/*.py")}
    files = {file for file in files if not file.startswith("common/") and not file.endswith("__init__.py")}
    others = files - {recipe.name.partition(":")[0] for recipe in configs.recipes()}
    assert others == {file for file in files if file.startswith("sweeps/")}


@pytest.mark.parametrize("name", sorted({r.name.partition(":")[0] for r in configs.recipes() if ":" in r.name}))
def test_an_unknown_variant_is_answered_with_the_known_ones(name):
    module = importlib.import_module("configs." + name.removesuffix(".py").replace("/", "."))
    with pytest.raises(ValueError, match=f"{module.VARIANTS[-1]}.*got 'nonsense'"):
        module.get_config("nonsense")
