"""A run small enough to be trained in the tests, and the command line."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict

from configs.s4nd import digits

ROOT = Path(__file__).resolve().parent.parent.parent

TINY: dict[str, Any] = {
    "model.d_model": 8,
    "model.n_layers": 1,
    "model.mixer.d_state": 4,
    "batch_size": 256,  # 4 steps per epoch
    "epochs": 3.0,
    "optimizer.warmup_epochs": 1.0,
    "eval.every_epochs": 2.0,
    "eval.resolutions": (4,),
    "checkpoint_every_epochs": 1.0,
    "log_every_steps": 3,
}


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


class Command:
    """`python -m MODULE` with the tiny config, as a process of its own."""

    def __init__(self, module="experiments.train", *, config="configs/s4nd/digits.py", tiny=True):
        self.module = module
        given = [f"--config={config}"] if config else []
        fields = TINY if tiny else {}
        self.arguments = given + [f"--config.{name}={value}" for name, value in fields.items()]

    def start(self, *arguments, devices=1, **environment) -> subprocess.Popen:
        environment = {
            # Unoptimized code is compiled in half the time.
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
            "PYTHONPATH": str(ROOT),
            **environment,
        }
        return subprocess.Popen(
            [sys.executable, "-m", self.module, *self.arguments, *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments, **options) -> subprocess.CompletedProcess:
        process = self.start(*arguments, **options)
        output, errors = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


@pytest.fixture(scope="session")
def command():
    """The class `Command`."""
    return Command
