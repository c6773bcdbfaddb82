"""Runs the notebooks as a reader would, and looks at what is committed.

`jupyter execute --inplace notebooks/NAME.ipynb` writes the outputs anew.
"""

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook):
    """What all cells print, one after the other; what they write to stderr is not for a reader."""
    streams = [out for cell in code_cells(notebook) for out in cell.outputs if out.output_type == "stream"]
    assert [out.text for out in streams if out.name != "stdout"] == []
    return "".join(out.text for out in streams)


def pictures(notebook):
    return sum("image/png" in out.get("data", {}) for cell in code_cells(notebook) for out in cell.outputs)


def check_s4nd_tour(text):
    differences = [float(value) for value in re.findall(r"largest difference.* (\S+)$", text, re.MULTILINE)]
    assert len(differences) == 5
    assert max(differences) < 1e-4
    accuracy = {int(size): float(value) for size, value in re.findall(r"^(\d+) x \1: ([\d.]+)%", text, re.MULTILINE)}
    assert list(accuracy) == [4, 6, 8, 12, 16]
    assert accuracy[8] >= 95
    assert min(accuracy[6], accuracy[12], accuracy[16]) >= 85
    assert accuracy[4] >= 50


def check_s6la_tour(text):
    differences = [float(value) for value in re.findall(r"largest difference.* (\S+)$", text, re.MULTILINE)]
    assert len(differences) == 6
    assert max(differences) < 1e-5
    (accuracy,) = re.findall(r"^test accuracy ([\d.]+)%$", text, re.MULTILINE)
    assert float(accuracy) >= 93


def check_zero_shot_resolution(text):
    row = r"^(\S.*?)  +" + r" +".join([r"([\d.]+) ± [\d.]+"] * 5) + "$"
    accuracies = {label: [float(x) for x in means] for label, *means in re.findall(row, text, re.MULTILINE)}
    limited, free, conv2d, untold = accuracies.values()  # at 6, 8, 12, 16 and 32
    assert min(limited[1], free[1], conv2d[1]) >= 90
    assert min(limited[2:]) >= 85
    assert limited[0] > free[0]
    assert max(*conv2d[2:], *untold[2:]) < 70


def check_your_own_model(text):
    differences = [float(value) for value in re.findall(r"largest difference.* (\S+)$", text, re.MULTILINE)]
    assert len(differences) == 2
    assert max(differences) < 1e-5
    losses = [(float(first), float(last)) for first, last in re.findall(r"loss ([\d.]+) to ([\d.]+)", text)]
    assert len(losses) == 4
    assert all(last < first / 4 for first, last in losses)
    accuracies = [float(value) for value in re.findall(r"test accuracy(?: at \d+ x \d+:)? ([\d.]+)%", text)]
    assert len(accuracies) == 5
    assert min(accuracies) >= 80
    (moved,) = re.findall(r"^largest change of a parameter in SSMParam (\S+)$", text, re.MULTILINE)
    assert float(moved) > 0


def check_reproduce_tables(text):
    (gain,) = re.findall(r"^([\d.]+) points apart", text, re.MULTILINE)
    assert float(gain) >= 20
    scores = [float(value) for value in re.findall(r"'([\d.]+) %'", text)]
    assert len(scores) == 3  # digits at 4 x 4, 8 x 8 and 16 x 16
    assert max(scores) > 80
    assert re.search(r"^\d+ recipes are in configs/$", text, re.MULTILINE)


CHECKS = {
    "reproduce_tables": check_reproduce_tables,
    "s4nd_tour": check_s4nd_tour,
    "s6la_tour": check_s6la_tour,
    "your_own_model": check_your_own_model,
    "zero_shot_resolution": check_zero_shot_resolution,
}
"""By notebook, what the text that it prints must say."""


def test_every_notebook_is_checked():
    assert [path.stem for path in NOTEBOOKS] == sorted(CHECKS)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path / "ipython")}
    del environment["XLA_FLAGS"]  # the tests' 8 slow devices
    notebook = nbformat.read(path, as_version=4)
    committed = pictures(notebook)
    client = NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)
    CHECKS[path.stem](printed(notebook))
    assert pictures(notebook) == committed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_as_it_ran_from_top_to_bottom(path):
    assert path.stat().st_size < 1_000_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert pictures(notebook) > 0
    CHECKS[path.stem](printed(notebook))
