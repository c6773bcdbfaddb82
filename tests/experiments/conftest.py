"""A run small enough to be trained in the tests, and the command line."""

import jax
import pytest
from ml_collections import ConfigDict
from processes import TINY, Command

from configs.s4nd import digits


@pytest.fixture(autouse=True, scope="session")
def optax_promotion():
    """Optax relies on type promotion (`1 - decay**count`); tests/training checks the rest of a step without it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def tiny_config():
    """Makes configs/s4nd/digits.py small; dotted fields as arguments change it further."""

    def make(**fields) -> ConfigDict:
        config = digits.get_config()
        for name, value in (TINY | fields).items():
            section, _, field = name.rpartition(".")
            holder = config
            for part in section.split(".") if section else []:
                holder = holder[part]
            with holder.ignore_type():
                holder[field] = value
        return config

    return make


@pytest.fixture(scope="session")
def finished(tiny_config, tmp_path_factory):
    """A finished run: its workdir, its config and what `train` returned."""
    from experiments.train import train

    workdir = tmp_path_factory.mktemp("runs") / "finished"
    config = tiny_config()
    return workdir, config, train(config, workdir)


@pytest.fixture(scope="session")
def command():
    """The class `Command`."""
    return Command
