r"""What a start may be asked for besides the run itself: a trace of some steps, and its metrics somewhere else.

`--profile=10:15` traces the steps 10 to 15 of this start into WORKDIR/profile, and `--profile=5` five of them after
ten, of which the first compiles. To look at a trace, `pip install xprof` and `xprof WORKDIR/profile`, or TensorBoard
with that plugin.

`--writer=MODULE:FUNCTION` gives all metrics also to the `ssm_jax.training.metrics.Writer` that the function returns,
for the workdir, the config as a dict, and the step after which this start goes on; on the first process only. For
Weights & Biases, `--writer=wandb_writer:WandbWriter` and in wandb_writer.py in the current directory:

    import wandb

    class WandbWriter:
        def __init__(self, workdir, config, step):
            name = str(workdir).strip("/").replace("/", "-")
            self.run = wandb.init(project="ssm_jax", id=name, resume="allow", config=config)

        def write(self, step, metrics):
            self.run.log(dict(metrics), step=step)

        def flush(self):  # a checkpoint is about to be saved
            pass

        def close(self):
            self.run.finish()
"""

import importlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from etils import epath

from experiments.config import ConfigError
from ssm_jax.training.metrics import Writer

MakeWriter = Callable[[epath.Path, dict[str, Any], int], Writer]

_WARM_UP = 10
"""Steps before those that are traced, where only their number is given."""


class Steps(NamedTuple):
    """Steps of a start, which counts from 1; both are traced, and those between."""

    first: int
    last: int


def parse_profile(text: str) -> Steps:
    """The steps of `--profile`. Raises ConfigError."""
    found = re.fullmatch(r"(?:(\d+):)?(\d+)", text)
    if found:
        last = int(found[2])
        steps = Steps(int(found[1]), last) if found[1] else Steps(_WARM_UP + 1, _WARM_UP + last)
        if 1 <= steps.first <= steps.last:
            return steps
    raise ConfigError(
        f"--profile must be FIRST:LAST, numbers of steps of this start from 1 on, such as 10:15, or how many after "
        f"the first {_WARM_UP}, got {text!r}."
    )


def check_profile(steps: Steps, start: int, total: int) -> Steps:
    """The numbers that these steps have in a run of `total` steps. Raises ConfigError if it has fewer left."""
    if steps.last > total - start:
        raise ConfigError(
            f"--profile asks for step {steps.last} of this start, which has {total - start} left to take."
        )
    return Steps(start + steps.first, start + steps.last)


def find_writer(name: str) -> MakeWriter:
    """What `--writer` names. Raises ConfigError, also for what it makes if that is no writer."""
    module, _, function = name.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), function)
        if not callable(found):
            raise TypeError(f"{found!r} is not a function")
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"--writer must be MODULE:FUNCTION, of a module that is installed or here, got {name!r}: {error}."
        ) from error

    def make(workdir: epath.Path, config: dict[str, Any], step: int) -> Writer:
        writer: Any = found(workdir, config, step)
        if not isinstance(writer, Writer):
            raise ConfigError(f"--writer={name} must make what has write, flush and close, got {writer!r}.")
        return writer

    return make
