"""Checking configs: mistakes are answered before anything compiles, with the field and the fix."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from ssm_jax.training.checkpoint_files import gathered

Config = Any
"""An ml_collections ConfigDict, whose fields a type checker cannot know."""

_OF_THE_STATE = (
    "model.",
    "data.name",
    "smoke",
    "ema_decay",
    "optimizer.name",
    "optimizer.decay_rule",
    "optimizer.frozen",
)
"""Fields, or how they begin, that decide which arrays there are in a checkpoint."""


class ConfigError(ValueError):
    """A config asks for something impossible; the message names the field and the fix."""


def flatten(config: Config) -> dict[str, Any]:
    """All fields of a config, or of one read from JSON, by their dotted names."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            flat |= {f"{name}.{inner}": leaf for inner, leaf in flatten(value).items()}
        else:
            flat[name] = value
    return flat


@contextlib.contextmanager
def section(config: Config, name: str) -> Iterator[None]:
    """Turns a ValueError about an argument into a ConfigError about the field of `config.name` that it came from.

    Messages of the library begin with the argument's name, which is also the last part of the field's.
    """
    try:
        yield
    except ValueError as error:
        argument = str(error).split(maxsplit=1)[0].removesuffix("'s")
        fields = [field for field in flatten(config) if field.startswith(f"{name}.") and field.endswith(f".{argument}")]
        message = str(error).removeprefix(argument)
        raise ConfigError(f"config.{fields[0]}{message}" if fields else f"config.{name}: {error}") from error


def check(config: Config) -> None:
    """Refuses values that no run could use; what depends on data, model or devices is checked where those are made."""
    positive = (lambda x: 0 < x < math.inf, "positive")
    not_negative = (lambda x: 0 <= x < math.inf, "at least 0")
    at_least_1 = (lambda x: x >= 1, "at least 1")
    share = (lambda x: 0 <= x <= 1, "in [0, 1]")
    allowed: dict[str, tuple[Callable[[Any], bool], str]] = {
        "dtype": (lambda x: x in ("float32", "bfloat16"), "'float32' or 'bfloat16'"),
        "data.resolution": (lambda x: x is None or x >= 1, "at least 1"),
        "data.workers": not_negative,
        "data.max_broken": share,
        "data.max_objects": at_least_1,
        "augment.repeats": at_least_1,
        "augment.erasing": share,
        "augment.mixup": not_negative,
        "augment.cutmix": not_negative,
        "augment.mix_switch": share,
        "augment.mix_probability": share,
        "augment.mix_group": at_least_1,
        "batch_size": at_least_1,
        "accumulate": at_least_1,
        "epochs": positive,
        "stages.epochs": (
            lambda x: not x or (min(x) > 0 and math.isclose(sum(x), config.epochs)),
            f"positive and add up to epochs={config.epochs}",
        ),
        "stages.resolutions": (
            lambda x: len(x) == len(config.stages.epochs) and all(isinstance(r, int) and r >= 1 for r in x),
            f"as many whole numbers as there are stages.epochs={config.stages.epochs}",
        ),
        "stages.bandlimits": (
            lambda x: len(x) == len(config.stages.epochs) and all(0 <= b < math.inf for b in x),
            f"as many as there are stages.epochs={config.stages.epochs}, each at least 0, which is for none",
        ),
        "optimizer.lr": positive,
        "optimizer.ssm_lr": not_negative,
        "optimizer.ssm_c_lr": (lambda x: x is None or 0 <= x < math.inf, "at least 0"),
        "optimizer.warmup_lr": not_negative,
        "optimizer.end_lr": not_negative,
        "optimizer.weight_decay": not_negative,
        "optimizer.cosine_epochs": (
            lambda x: x is None or config.optimizer.warmup_epochs < x < math.inf,
            f"more than warmup_epochs={config.optimizer.warmup_epochs}",
        ),
        "optimizer.warmup_epochs": (
            lambda x: 0 <= x < min((config.epochs, *config.stages.epochs)),
            "at least 0 and less than "
            + (
                f"the shortest of stages.epochs={config.stages.epochs}"
                if config.stages.epochs
                else f"epochs={config.epochs}"
            ),
        ),
        "optimizer.decay_epochs": (
            lambda x: all(config.optimizer.warmup_epochs <= epoch < config.epochs for epoch in x),
            f"epochs after the warm-up and before the end, epochs={config.epochs}",
        ),
        "optimizer.frozen": (lambda x: all(isinstance(name, str) for name in x), "names, such as ('backbone',)"),
        "optimizer.clip_norm": (lambda x: x is None or x > 0, "positive"),
        "optimizer.momentum": (lambda x: 0 <= x < 1, "in [0, 1)"),
        "sharding_rules": (
            lambda x: all(
                isinstance(rule, tuple | list)
                and len(rule) == 2
                and isinstance(rule[0], str)
                and isinstance(rule[1], int | None)
                for rule in x
            ),
            'pairs of a name and an axis, or None, such as (("head.kernel", 1),)',
        ),
        "label_smoothing": (lambda x: 0 <= x < 1, "in [0, 1)"),
        "ema_decay": (lambda x: 0 <= x < 1, "in [0, 1); 0 is for no averaging"),
        "eval.every_epochs": positive,
        "eval.batch_size": at_least_1,
        "eval.resolutions": (lambda x: all(isinstance(r, int) and r >= 1 for r in x), "whole numbers of at least 1"),
        "eval.frames": (lambda x: all(isinstance(n, int) and n >= 1 for n in x), "whole numbers of at least 1"),
        "checkpoint_every_epochs": positive,
        "log_every_steps": at_least_1,
    }
    values = flatten(config)
    for field, (holds, what) in allowed.items():
        if not holds(values[field]):
            raise ConfigError(f"config.{field} must be {what}, got {values[field]!r}.")


_MAY_CHANGE = ("mesh.", "sharding_rules", "data.dir", "data.workers")
"""What the fields begin with that make no difference to a run, but for where it is and how fast."""


def check_workdir(workdir: epath.Path, config: Config) -> None:
    """Raises ConfigError if `workdir` holds a run of another config or files of something else.

    The mesh, and where and how data is read, may be others than before.
    """
    path = workdir / "config.json"
    if path.exists():
        if differences := _differences(path, config, without=_MAY_CHANGE):
            raise ConfigError(
                f"--workdir={workdir} holds a run of another config:\n" + "\n".join(differences) + "\n"
                "Use another --workdir, or that config to go on with it."
            )
        return
    foreign = sorted(entry.name for entry in workdir.iterdir() if entry.suffix != ".tmp") if workdir.exists() else []
    if foreign:
        raise ConfigError(
            f"--workdir={workdir} is not empty and not a run (it has {', '.join(foreign[:5])} but no config.json). "
            "Use an empty or new directory."
        )


def claim_workdir(workdir: epath.Path, config: Config) -> None:
    """Makes `workdir` this config's, by writing config.json.

    Raises ConfigError, and touches nothing, as `check_workdir` does.
    """
    check_workdir(workdir, config)
    path = workdir / "config.json"
    if jax.process_index() == 0 and not (path.exists() and not _differences(path, config)):
        workdir.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(config.to_dict(), indent=2) + "\n")


def check_alike(config: Config, workdir: epath.Path) -> None:
    """Raises ConfigError if the processes of a run were started with different configs or workdirs.

    Their data may be in different places.
    """
    here = {"--workdir": str(workdir)} | {f"config.{name}": value for name, value in flatten(config).items()}
    del here["config.data.dir"]
    first, *others = map(json.loads, gathered(json.dumps(here)))
    for number, other in enumerate(others, start=1):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise ConfigError(
                    f"all processes must be started alike, but {name} is {first.get(name)!r} in process 0 and "
                    f"{other.get(name)!r} in process {number}."
                )


def write_file(path: epath.Path, text: str) -> None:
    """Writes a file whole or not at all."""
    written = path.with_suffix(".tmp")
    written.write_text(text)
    written.replace(path)


def check_same_network(workdir: epath.Path, config: Config) -> None:
    """Raises ConfigError if the run in `workdir` has another network, dataset or kind of optimizer than `config`."""
    path = workdir / "config.json"
    if path.exists() and (differences := _differences(path, config, within=_OF_THE_STATE)):
        raise ConfigError(
            f"{workdir} is a run of another network:\n" + "\n".join(differences) + "\n"
            "Repeat the --config overrides of that run."
        )


def _differences(
    path: epath.Path, config: Config, *, within: tuple[str, ...] = ("",), without: tuple[str, ...] = ()
) -> list[str]:
    """A line for each field that is another in `config` than in a file.

    Of those that begin with one of `within` and none of `without`.
    """
    there = flatten(json.loads(path.read_text()))
    here = flatten(json.loads(json.dumps(config.to_dict())))  # tuples become lists, as they did in the file
    return [
        f"  config.{field}: {there.get(field, 'absent')!r} there, {here.get(field, 'absent')!r} now"
        for field in sorted(there.keys() | here.keys())
        if there.get(field, "absent") != here.get(field, "absent")
        and field.startswith(within)
        and not field.startswith(without)
    ]
