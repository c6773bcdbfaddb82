"""The papers' tables, of results that are made here, and those that are committed."""

import fnmatch
import itertools
import json
from pathlib import Path

import pytest

from experiments import results, tables
from experiments.config import ConfigError
from experiments.configs import recipes
from experiments.published import CLAIMS, COSTS, GROUPS, PAPERS

ROOT = Path(__file__).resolve().parents[2]


def run(accuracy=None, error=None):
    if accuracy is None:
        return {"id": "a/b/seed_1"} | ({"state": "failed", "error": error} if error else {"state": "missing"})
    known = {"ended": "2026-01-01", "device": "cpu", "devices": 1, "commit": "abc", "versions": {}}
    scores = {"8": {"accuracy": accuracy}, "32": {"accuracy": accuracy / 2}}
    return {"id": "a/b/seed_0", "state": "finished", "scores": scores, "seconds": 90.0, **known}


@pytest.fixture
def folder(tmp_path):
    """Results of a sweep called zero_shot with two rows, and a compile report."""
    row = {"model": "isotropic_s4nd", "parameters": 1234, "dataset": "CIFAR-10", "resolution": 8, "steps": 10}
    row |= {"images": {"train": 100, "val": 10, "test": 10}, "batch_size": 5}
    rows = {
        "s4nd": {"label": "S4ND", **row, "runs": {"0": run(0.5), "1": run(0.6)}},
        "conv": {"label": "Conv2D", **row, "runs": {"0": run(0.4), "1": run(error="out of memory")}},
    }
    table = {"title": "From 8", "note": "Width 64.", "metric": "accuracy", "by": "resolution", "rows": rows}
    found = {"paper": "s4nd", "sweep": "zero_shot", "command": "a command", "tables": {"from_8": table}}
    (tmp_path / "zero_shot.json").write_text(json.dumps(found))
    stage = {"seconds": 0.36, "mesh": {"data": 32, "fsdp": 2}, "device": "TPU v5e"}
    report = {"topology": "v5e:8x8", "slices": 1, "stages": [stage]}
    (tmp_path / "compile").mkdir()
    (tmp_path / "compile/s6la-imagenet_resnet50-v5e-8x8.json").write_text(json.dumps(report))
    counted = {
        "s6la/imagenet_resnet50.py": {"parameters": 25_557_032, "multiply_adds": [4e9]},
        "s6la/imagenet_resnet101.py": {"parameters": 44_549_160, "multiply_adds": [8e9]},
        "s6la/coco_retinanet_resnet50.py": {"parameters": 33_840_000, "multiply_adds": None},
        "s4nd/cifar10_progressive_8.py:big": {"parameters": 5_282_826, "multiply_adds": [1e9, 3e9]},
        "s4nd/imagenet_vit_s4nd.py": {"parameters": 88_786_408, "multiply_adds": [17e9]},
    }
    (tmp_path / "counted").mkdir()
    (tmp_path / "counted/recipes.json").write_text(json.dumps(counted))
    return tmp_path


def cells(page, title):
    """Of the table under a title of a page in Markdown."""
    lines = page.partition(f"### {title}\n\n")[2].splitlines()
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if not row.startswith("| :--")]


def page(folder):
    known = tables.load_known(folder)
    return tables.markdown({paper: [*tables.sheets(paper, known)] for paper in PAPERS})


def by_recipe(folder, title):
    """The cells of a table of recipes, by columns."""
    columns, *rows = cells(page(folder), title)
    return {row[0]: dict(zip(columns, row, strict=True)) for row in rows}


def test_every_recipe_of_a_paper_is_in_one_table():
    for recipe in recipes():
        paper = recipe.name.partition("/")[0]
        if paper in PAPERS and recipe.name != "s4nd/digits.py":
            of = [g for g in GROUPS if any(fnmatch.fnmatch(recipe.name, pattern) for pattern in g.recipes)]
            assert [group.paper for group in of] == [paper], recipe.name


def test_published_numbers_are_those_of_the_recipes(folder):
    known = {recipe.name: recipe.config.published for recipe in recipes()}
    rows = by_recipe(folder, "ImageNet-1k (section 4.1)")
    assert len(rows) == 5
    for name, row in rows.items():
        value = known[name].value
        assert row["published"] == ("" if value is None else f"{value} {known[name].metric}")
        assert row["source"] == known[name].source + ("" if value is None else " (confirmed)")
        assert row["here"] == "not run"
        assert row["to run it"].startswith(f"`python -m experiments.train --config=configs/{name} --workdir=runs/")


def test_numbers_that_could_not_be_read_again_say_so(folder):
    rows = by_recipe(folder, "Video, HMDB-51 (section 4.2)")
    assert {row["source"] for row in rows.values()} == {"S4ND's paper (recalled, not verified)"}


def test_claims_say_how_sure_they_are():
    assert {claim.paper for claim in CLAIMS} == set(PAPERS)
    assert all(claim.value and claim.source and claim.status for claim in CLAIMS)
    assert not any("S6LA's paper" in claim.source for claim in CLAIMS)  # nobody here could read it


def test_results_are_means_and_deviations_of_the_runs(folder):
    found = cells(page(folder), "From 8 (here, at a reduced size)")
    assert found[0] == ["network", "parameters", "training", "runs", "8 x 8, %", "32 x 32, %", "runs/"]
    assert found[1] == ["S4ND", "1,234", "1.5 min", "2 of 2", "55.00 ± 7.07", "27.50 ± 3.54", "`s4nd/seed_{0,1}`"]
    assert found[2] == ["Conv2D", "1,234", "1.5 min", "1 of 2 (failed: seed 1)", "40.00", "20.00", "`conv/seed_0`"]
    text = page(folder)
    assert "CIFAR-10 (100 training images); 10 steps of 5." in text
    assert "Runs are in zero_shot/from_8/; `a command`." in text
    assert "None of these was run; at a reduced size: zero_shot, above." in text


def test_tpu_hours_are_steps_times_chips(folder):
    """ResNet-50's recipe: 120 epochs of 1,281,167 images in batches of 256."""
    steps = 120 * (1_281_167 // 256)
    hours = 0.36 * steps * 64 / 3600
    rows = by_recipe(folder, "ResNets on ImageNet-1k")
    assert rows["s6la/imagenet_resnet50.py"]["TPU-hours by XLA"] == f"{hours:,.0f}"
    counted = 3 * 2 * 8e9 * steps * 256 / (0.4 * 197e12) / 3600
    assert rows["s6la/imagenet_resnet101.py"]["TPU-hours counted"] == f"~{counted:,.0f}"
    assert rows["s6la/imagenet_resnet101.py"]["TPU-hours by XLA"] == "not compiled"
    assert rows["s6la/imagenet_resnet152.py"]["TPU-hours counted"] == "not counted"
    times = hours / (counted / 2)
    assert f"where XLA's estimate is known, it is {times:.0f} to {times:.0f} times that." in page(folder)


def test_each_stage_of_progressive_resizing_is_counted(folder):
    """80 epochs of 45,000 small images and 20 of large ones."""
    row = by_recipe(folder, "Progressive resizing (section 4.3)")["s4nd/cifar10_progressive_8.py:big"]
    counted = 3 * 2 * 45_000 * (80 * 1e9 + 20 * 3e9) / (0.4 * 197e12) / 3600
    assert row["TPU-hours counted"] == f"~{counted:.2g}"
    assert (row["parameters"], row["multiply-adds"]) == ("5.28 M", "3.00 G")


def test_multiply_adds_of_detectors_are_not_counted(folder):
    row = by_recipe(folder, "Detection and instance segmentation, COCO")["s6la/coco_retinanet_resnet50.py"]
    assert (row["parameters"], row["multiply-adds"], row["TPU-hours counted"]) == (
        "33.84 M",
        "not counted",
        "not counted",
    )


def test_published_costs_are_beside_those_counted_here(folder):
    rows = cells(page(folder), "Parameters and multiply-adds")
    vit = ["s4nd/imagenet_vit_s4nd.py", "parameters", "88.8 M", "88.79 M", "De-focus's README (confirmed)"]
    assert vit in rows
    assert {cost.recipe for cost in COSTS} <= {recipe.name for recipe in recipes()}


def test_networks_have_as_many_parameters_as_published():
    """To the digits that are."""
    counted = tables.load_known(ROOT / "results").counted
    for cost in COSTS:
        if cost.what == "parameters":
            number = cost.value.removesuffix(" M")
            digits = len(number.partition(".")[2])
            assert f"{counted[cost.recipe]['parameters'] / 1e6:.{digits}f}" == number, cost


@pytest.mark.parametrize(
    "name",
    [
        "s4nd/cifar10_iso_small.py",
        "s4nd/cifar10_progressive_8.py:conv2d",
        "s6la/cifar10_resnet20_s6la.py",
        "s6la/coco_retinanet_resnet50.py",
        "s6la/imagenet_resnet50.py",
    ],
)
def test_the_committed_counts_are_those_of_the_recipes(name):
    """`python -m experiments.tables --count` makes them; all of them take minutes."""
    known = {recipe.name: recipe.config for recipe in recipes()}
    counted = tables.load_known(ROOT / "results").counted
    assert counted.keys() == known.keys()
    assert counted[name] == tables.count(known[name])


def test_pages_in_html_have_the_same_cells(folder):
    made = tables.html({"s4nd": [*tables.sheets("s4nd", tables.load_known(folder))]})
    assert "<td>55.00 ± 7.07</td>" in made
    assert "<code>python -m experiments.train --config=configs/s4nd/cifar10_iso.py" in made
    assert "http" not in made.partition("</style>")[2].replace("https://", "http")


def test_a_terminal_is_not_too_narrow(folder, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    tables.print_sheets({"s4nd": [*tables.sheets("s4nd", tables.load_known(folder))]})
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert "55.00 ± 7.07" in printed


def test_in_a_pipe_no_cell_is_broken(folder, monkeypatch, capsys):
    monkeypatch.delenv("COLUMNS", raising=False)
    tables.print_sheets({"s4nd": [*tables.sheets("s4nd", tables.load_known(folder))]})
    printed = capsys.readouterr().out.splitlines()
    assert any(" s4nd/cifar10_iso.py " in line and "94.1 accuracy" in line for line in printed)
    assert any(line.split()[0] == "S4ND" and "55.00 ± 7.07" in line for line in printed if line.split())


@pytest.mark.parametrize("text", ["{", "{}", '{"topology": "v5e:8x8", "slices": 1, "stages": [{}]}'])
def test_a_file_that_is_no_compile_report_is_named(folder, text):
    (folder / "compile/s6la-imagenet_resnet50-v5e-8x8.json").write_text(text)
    with pytest.raises(ConfigError, match=r"resnet50-v5e-8x8\.json is no report of experiments\.compile"):
        tables.tpu_hours(folder / "compile")


def test_a_compile_report_of_no_recipe_is_refused(folder):
    (folder / "compile/s6la-imagenet_resnet50-v5e-8x8.json").rename(folder / "compile/net-v5e-8x8.json")
    with pytest.raises(ConfigError, match=r"net-v5e-8x8\.json is of no recipe"):
        tables.tpu_hours(folder / "compile")


@pytest.mark.parametrize("text", ["{", '{"s4nd/digits.py": {}}', '{"net": {"parameters": 1, "multiply_adds": [1]}}'])
def test_a_file_that_has_no_counts_is_named(folder, text):
    (folder / "counted/recipes.json").write_text(text)
    with pytest.raises(ConfigError, match=r"recipes\.json is not what experiments\.tables --count writes"):
        tables.load_known(folder)


@pytest.mark.parametrize("field", ["paper", "command", "sweep", "tables.from_8.title"])
def test_a_field_that_results_lack_is_named(folder, field):
    *parents, last = field.split(".")
    found = json.loads((folder / "zero_shot.json").read_text())
    of = found
    for parent in parents:
        of = of[parent]
    del of[last]
    (folder / "zero_shot.json").write_text(json.dumps(found))
    message = rf"zero_shot\.json has not what experiments\.sweep writes: KeyError '{last}'\. Make it anew"
    with pytest.raises(ConfigError, match=message):
        tables.load_known(folder)


def test_results_of_an_unknown_paper_are_refused(folder):
    text = (folder / "zero_shot.json").read_text().replace('"paper": "s4nd"', '"paper": "s5nd"')
    (folder / "zero_shot.json").write_text(text)
    with pytest.raises(ConfigError, match=r"zero_shot\.json: paper must be s4nd or s6la, got 's5nd'"):
        tables.load_known(folder)


def test_the_readme_has_the_first_row_and_the_best_of_the_others(folder):
    found = results.load(folder)
    of_table = found["zero_shot"]["tables"]["from_8"]
    of_table["rows"]["worse"] = of_table["rows"]["conv"] | {"label": "Worse", "runs": {"0": run(0.3)}}
    *_, line = tables.of_readme(found).splitlines()
    first, best = ["S4ND", "27.50 ± 3.54", "1.5 min"], ["Conv2D", "20.00", "1.5 min"]
    assert [cell.strip() for cell in line.strip("|").split("|")] == ["From 8", "32 x 32", *first, *best]


def test_the_readme_has_no_line_for_what_was_not_run(folder):
    found = results.load(folder)
    found["zero_shot"]["tables"]["from_8"]["rows"]["conv"]["runs"] = {}
    assert tables.of_readme(found) == tables.of_readme({})


def test_a_page_without_markers_is_refused():
    with pytest.raises(ConfigError, match="--readme must be a page with"):
        tables.renewed("no markers", "text")


def test_what_is_committed_is_made_of_the_results():
    """`python -m experiments.tables --markdown=docs/tables.md --readme=README.md` writes both."""
    readme = (ROOT / "README.md").read_text()
    assert tables.renewed(readme, tables.of_readme(results.load(ROOT / "results"))) == readme
    assert page(ROOT / "results") == (ROOT / "docs/tables.md").read_text()


def test_the_committed_results_are_of_finished_runs():
    found = results.load(ROOT / "results")
    assert found
    for of_sweep in found.values():
        runs = [r for t in of_sweep["tables"].values() for row in t["rows"].values() for r in row["runs"].values()]
        assert {r["state"] for r in runs} == {"finished"}
        assert all(r["commit"] and "dirty" not in r["commit"] for r in runs)


def test_an_unknown_paper_is_answered_with_those_there_are(command):
    done = command("experiments.tables", config=None, tiny=False).run("s5nd")
    assert done.returncode == 2
    assert done.stderr.strip() == "error: there are tables of s4nd and s6la, got s5nd."


@pytest.mark.parametrize("name", ["empty", "elsewhere"])
def test_a_page_is_not_emptied_for_results_that_are_not_there(command, tmp_path, name):
    page, folder = tmp_path / "README.md", tmp_path / name
    page.write_text(f"{tables.START}\na table\n{tables.END}")
    (tmp_path / "empty").mkdir()
    done = command("experiments.tables", config=None, tiny=False).run(f"--results={folder}", f"--readme={page}")
    assert done.returncode == 2
    told = {"empty": f"has no results to put into --readme={page}.", "elsewhere": "is no directory."}
    assert done.stderr.strip() == f"error: --results={folder} {told[name]}"
    assert "a table" in page.read_text()
