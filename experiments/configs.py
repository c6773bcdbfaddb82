r"""Lists the recipes in configs/, with the numbers that others report for them.

    python -m experiments.configs [--markdown=docs/recipes.md]

A file whose `get_config` takes an argument lists the values it is for as `VARIANTS`, as in FILE:VARIANT. `--markdown`
writes the table to a file instead.
"""

import functools
import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import app, flags
from flax import nnx
from rich import box
from rich.table import Table

import configs
import ssm_jax
from experiments.config import Config
from experiments.terminal import console
from ssm_jax.data.datasets import outline
from ssm_jax.detection import create_detector

_FOLDER = Path(configs.__file__).parent

_INTRODUCTION = """\
# Recipes

Every recipe of the papers is a file in `configs/`, built from functions in `configs/common/`. To train one:

    python -m experiments.train --config=configs/FILE --workdir=runs/NAME --config.data.dir=FOLDER

What comes after a colon in FILE is a variant of it. To see in a minute whether it starts at all on your data and
devices, add `--config.smoke=True`, and another workdir: it takes two steps with a tiny network of the kind, from random
parameters.

None of these has been run to its end by this project unless its file says so. *Published* is what others report for the
recipe, never a result of this project: in per cent, and with where it is from. Parameters are counted for as many
classes as the dataset has (an image folder: 1000); batch sizes are those of an update, over all devices.

This page is what `python -m experiments.configs --markdown=docs/recipes.md` writes.
"""

COLUMNS = {
    "config": "left",
    "dataset": "left",
    "model": "left",
    "parameters": "right",
    "epochs": "right",
    "batch": "right",
    "published": "left",
    "source": "left",
}
"""Of the table, and how they are aligned."""


class Recipe(NamedTuple):
    """A config, and what makes it: a file in configs/, with a variant after a colon if it has any."""

    name: str
    config: Config


def recipes() -> Iterator[Recipe]:
    """All recipes in configs/, by name. What `experiments.sweep` takes has several in one, and is none of them."""
    for path in sorted(_FOLDER.rglob("*.py")):
        file = path.relative_to(_FOLDER)
        if path.name == "__init__.py" or file.parts[0] == "common":
            continue
        module = importlib.import_module(".".join([configs.__name__, *file.with_suffix("").parts]))
        for variant in getattr(module, "VARIANTS", ("",)):
            config = module.get_config(variant) if variant else module.get_config()
            if "model" in config:
                yield Recipe(f"{file.as_posix()}:{variant}" if variant else file.as_posix(), config)


def count_parameters(config: Config) -> int:
    """Of a recipe's network, for the classes of its dataset; no arrays are made."""
    data = outline(config.data.name)
    return _count(json.dumps(config.model.to_dict()), data.classes, data.channels)


@functools.cache
def _count(arguments: str, num_classes: int, channels: int) -> int:
    options: dict[str, Any] = {**json.loads(arguments), "num_classes": num_classes}
    if "backbone" in options:
        model = nnx.eval_shape(lambda: create_detector(**options, rngs=nnx.Rngs(0)))
    else:
        model = nnx.eval_shape(lambda: ssm_jax.create_model(**options, in_channels=channels, rngs=nnx.Rngs(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def row(recipe: Recipe) -> list[str]:
    """A row of the table."""
    config = recipe.config
    published = config.published
    return [
        recipe.name,
        config.data.name,
        " + ".join(filter(None, [config.model.name, config.model.get("backbone", {}).get("name")])),
        f"{count_parameters(config) / 1e6:.2f} M",
        f"{config.epochs:g}",
        f"{config.batch_size:,}",
        "" if published.value is None else f"{published.value} {published.metric}",
        published.source,
    ]


def markdown() -> str:
    """The page with the table."""
    signs = {"left": ":--", "right": "--:"}
    lines = [list(COLUMNS), [signs[side] for side in COLUMNS.values()], *map(row, recipes())]
    return _INTRODUCTION + "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def print_table() -> None:
    """Prints what fits a terminal: without the networks' names, and sources only where there is a number."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption="In configs/; published numbers are in per cent.")
    for column in ("config", "dataset", "parameters", "epochs", "batch", "published (by others)"):
        justify: Any = COLUMNS.get(column, "left")
        table.add_column(column, justify=justify, no_wrap=column == "config", overflow="fold")
    for recipe in recipes():
        name, dataset, _, parameters, epochs, batch, published, source = row(recipe)
        table.add_row(name, dataset, parameters, epochs, batch, f"{published} ({source})" if published else "")
    console().print(table)


if __name__ == "__main__":
    _MARKDOWN = flags.DEFINE_string("markdown", None, "File to write the table to.")

    def main(argv: list[str]) -> None:
        """Does what the module says."""
        del argv
        if _MARKDOWN.value:
            Path(_MARKDOWN.value).write_text(markdown())
        else:
            print_table()

    app.run(main)
