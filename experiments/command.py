"""The command line that experiments share: flags, joining other processes, errors as messages."""

import difflib
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from experiments.config import ConfigError, flatten
from ssm_jax.data.pipeline import BrokenDataError
from ssm_jax.training.checkpoints import CheckpointError
from ssm_jax.training.loop import NonFiniteLossError

_T = TypeVar("_T")

config_flag = config_flags.DEFINE_config_file(
    "config", None, "Config file; override its fields with --config.FIELD=VALUE.", lock_config=True
)

INTERRUPTED = 130
"""Exit status, that of shells for Ctrl-C."""

_interrupted = threading.Event()


def run_command(main: Callable[[], Any]) -> None:
    """Parses the flags and runs `main`. Mistakes of the user end the process with a message and status 1 or 2."""
    flags.mark_flag_as_required("config")
    signal.signal(signal.SIGINT, _interrupt)

    def run(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            fail(f"unexpected argument {argv[1]!r}: options are written --NAME=VALUE.", status=2)
        join_processes()
        try:
            main()
        except ConfigError as error:
            fail(str(error), status=2)
        except (BrokenDataError, CheckpointError, NonFiniteLossError) as error:
            fail(str(error), status=1)
        except KeyboardInterrupt:
            fail("stopped; the same command goes on from the last checkpoint.", status=INTERRUPTED)

    app.run(run, flags_parser=parse)


def _interrupt(signum: int, frame: Any) -> None:
    del signum, frame
    _interrupted.set()
    raise KeyboardInterrupt


def until_interrupted(items: Iterable[_T]) -> Iterator[_T]:
    """The items, up to Ctrl-C.

    Its KeyboardInterrupt is lost where it happens to be raised in a callback of a library that ignores exceptions.
    """
    for item in items:
        if _interrupted.is_set():
            raise KeyboardInterrupt
        yield item


def parse(argv: Sequence[str]) -> list[str]:
    """Parses flags; an unknown config field is answered with the nearest ones."""
    try:
        rest = flags.FLAGS(argv)
        flatten(config_flag.value)  # raises OSError if the file was not found
        if flags.FLAGS["verbosity"].using_default_value:
            logging.set_verbosity(logging.WARNING)  # at INFO, absl's default, orbax tells a page for every checkpoint
        return rest
    except flags.Error as error:
        # Of what a config file raises, as for an unknown ARGUMENT in --config=FILE:ARGUMENT, it quotes the traceback.
        last = str(error).rstrip().rpartition("\n")[2]
        fail(last.partition("ValueError: ")[2] or str(error), status=2)
    except OSError as error:
        fail(f"--config: {error.__cause__ or error}", status=2)
    except (AttributeError, KeyError):  # what config_flags raises for an override of a field that is not there
        overrides = {arg: found[1] for arg in argv if (found := re.match(r"--?(?:no)?config\.([^=]+)", arg))}
        sys.argv = [arg for arg in argv if arg not in overrides]  # config_flags looks there for overrides
        flags.FLAGS(sys.argv)
        fields = flatten(config_flag.value)
        for field in overrides.values():
            if field not in fields:
                leaf = field.rpartition(".")[2]
                near = [f for f in fields if difflib.get_close_matches(leaf, [f.rpartition(".")[2]])]
                hint = " or ".join(f"config.{f}" for f in near) or "one of " + ", ".join(fields)
                fail(f"config has no field {field!r}; did you mean {hint}?", status=2)
        raise


def join_processes() -> None:
    """Joins the other processes of this program, where a TPU pod, SLURM or Open MPI started this one among several."""
    try:
        jax.distributed.initialize()
    except ValueError as error:
        if "coordinator_address" not in str(error):  # it is not among several
            raise


def fail(message: str, *, status: int) -> NoReturn:
    """Ends the process with a message."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized() or status == INTERRUPTED:
        # A regular exit waits for the other processes, which wait for this one in a collective, and after an interrupt
        # it takes the interpreter from under computations that still run, which then crash.
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
