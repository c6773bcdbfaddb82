r"""Compiles the train steps of all ImageNet recipes for slices of 64 TPU chips of each kind; no TPU needed.

    pip install -e '.[tpu]'
    python -m benchmarks.compile_matrix [--topologies=v5e:8x8] [--recipes='s4nd/*'] [--jobs=4] [--out=FOLDER]

Each cell is a run of experiments.compile, minutes on a core, that leaves a JSON file in a folder `compile_matrix` of
`--out`. Cells that are there are not compiled again. In the end, or with `--jobs=0` at once, a table of all that are
there is printed in markdown, and written beside the folder, to compile_matrix.md.
"""

import concurrent.futures
import fnmatch
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import app, flags

from benchmarks.side_by_side import OUT
from experiments.configs import recipes

TOPOLOGIES = ("v4:4x4x4", "v5e:8x8", "v5p:4x4x4", "v6e:8x8")

_TOPOLOGIES = flags.DEFINE_list("topologies", ",".join(TOPOLOGIES), "Slices to compile for.")
_RECIPES = flags.DEFINE_string("recipes", "*", "Pattern of names in `python -m experiments.configs`.")
_JOBS = flags.DEFINE_integer("jobs", 1, "Programs compiled at the same time.")


def imagenet_recipes(pattern: str) -> list[str]:
    """Names of the recipes for ImageNet that match."""
    return [
        recipe.name
        for recipe in recipes()
        if recipe.config.data.name == "imagenet2012" and fnmatch.fnmatch(recipe.name, pattern)
    ]


def file_of(folder: Path, recipe: str, topology: str) -> Path:
    """Where a cell is."""
    name = f"{recipe.replace('.py', '')}-{topology}".replace("/", "-").replace(":", "-")
    return folder / f"{name}.json"


def compile_cell(folder: Path, recipe: str, topology: str) -> str:
    """Makes the file of a cell, if there is none, and says what is in it; or what went wrong, without a file."""
    file = file_of(folder, recipe, topology)
    if not file.exists():
        command = ["experiments.compile", f"--config=configs/{recipe}", f"--topology={topology}", f"--out={file}"]
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
        if not file.exists():
            return f"{recipe} on {topology} failed:\n{done.stderr[-2000:]}"
    return f"{recipe} on {topology}: {cell(json.loads(file.read_text()))}"


def cell(found: Mapping[str, Any]) -> str:
    """Of the stage of training that takes most: memory, estimated time of a step, and MFU; or the largest batch."""
    stage = max(found["stages"], key=lambda stage: stage["needed"])
    if not stage["fits"]:
        return f"does not fit; largest batch {stage['largest_batch']:,}" if stage["largest_batch"] else "does not fit"
    return f"{stage['needed'] / 2**30:.2f} GiB, {1e3 * stage['seconds']:,.1f} ms, {stage['mfu']:.0%}"


def markdown(folder: Path) -> str:
    """The table of all cells that are there."""
    cells = {file.name: json.loads(file.read_text()) for file in folder.glob("*.json")}
    topologies = sorted({found["topology"] for found in cells.values()})
    lines = [
        ["recipe", "batch", "state, MB", *topologies],
        [":--", "--:", "--:", *("--:" for _ in topologies)],
    ]
    for recipe in imagenet_recipes("*"):
        row = [cells.get(file_of(folder, recipe, topology).name) for topology in topologies]
        if stages := [found["stages"][-1] for found in row if found]:
            state = f"{stages[0]['state'] / 1e6:,.0f}"
            batch = f"{stages[0]['batch_size']:,}"
            lines.append([recipe, batch, state, *("" if found is None else cell(found) for found in row)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(argv: list[str]) -> None:
    """Does what the module says."""
    del argv
    folder = Path(OUT.value) / "compile_matrix"
    folder.mkdir(parents=True, exist_ok=True)
    if _JOBS.value:
        cells = [(recipe, topology) for topology in _TOPOLOGIES.value for recipe in imagenet_recipes(_RECIPES.value)]
        with concurrent.futures.ThreadPoolExecutor(_JOBS.value) as pool:
            for said in pool.map(lambda names: compile_cell(folder, *names), cells):
                print(said, flush=True)
    table = markdown(folder)
    folder.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    app.run(main)
