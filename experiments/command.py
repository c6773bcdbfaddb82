"""The command line that experiments share: flags, joining other processes, errors as messages."""

import difflib
import errno
import gc
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from experiments import processes
from experiments.config import ConfigError, flatten
from experiments.lock import WorkdirInUseError
from experiments.processes import fail
from ssm_jax.data.pipeline import BrokenDataError
from ssm_jax.training.checkpoints import CheckpointError
from ssm_jax.training.loop import NonFiniteLossError, Stopped

config_flag = config_flags.DEFINE_config_file(
    "config", None, "Config file; override its fields with --config.FIELD=VALUE.", lock_config=True
)

_processes = flags.FlagValues()
"""How to find the other processes. Known before the others, so that these hear of mistakes in the rest."""

_ADDRESS = flags.DEFINE_string(
    "coordinator_address",
    None,
    "HOST:PORT of process 0, of several that no TPU pod, SLURM or Open MPI starts.",
    flag_values=_processes,
)
_COUNT = flags.DEFINE_integer("num_processes", None, "How many these are.", flag_values=_processes)
_NUMBER = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0 on.", flag_values=_processes)
flags.FLAGS.append_flag_values(_processes)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk, an exhausted quota, and a limit to the size of files."""


def run_command(main: Callable[[], Any]) -> None:
    """Parses the flags and runs `main` in all processes of the run.

    Mistakes of the user end them with a message and status 1 or 2, signals with those of `processes.STATUSES`.
    """
    flags.mark_flag_as_required("config")
    processes.listen_to_signals()

    def run(argv: Sequence[str]) -> None:
        join_processes()
        if len(argv) > 1:
            fail(f"unexpected argument {argv[1]!r}: options are written --NAME=VALUE.", status=2)
        status = 0
        try:
            main()
        except Stopped as stopped:
            print(f"stopped at step {stopped.step}; the same command goes on.", file=sys.stderr, flush=True)
            status = processes.stop_status()
        except ConfigError as error:
            fail(str(error), status=2)
        except (BrokenDataError, CheckpointError, NonFiniteLossError, WorkdirInUseError) as error:
            fail(str(error), status=1)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _FULL:
                fail(f"{error}. Free space where files are written, and start the same command again.", status=1)
            if processes.several():  # a regular exit waits for the others, which wait for this one
                fail(f"{type(error).__name__}: {error}", status=1, details=traceback.format_exc())
            raise
        gc.collect()  # the frames that Stopped came from, and with them batches in memory that is shared with workers
        processes.finish()
        sys.exit(status)

    app.run(run, flags_parser=parse)


def parse(argv: Sequence[str]) -> list[str]:
    """Parses flags; an unknown config field is answered with the nearest ones."""
    try:
        _processes(argv, known_only=True)
        rest = flags.FLAGS(argv)
        flatten(config_flag.value)  # raises OSError if the file was not found
        if flags.FLAGS["verbosity"].using_default_value:
            logging.set_verbosity(logging.WARNING)  # at INFO, absl's default, orbax tells a page for every checkpoint
            # And where a save fails, pages of tracebacks, one for each thread, of the error that it then raises.
            logging.get_absl_logger().addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))
        return rest
    except flags.Error as error:
        # Of what a config file raises, as for an unknown ARGUMENT in --config=FILE:ARGUMENT, it quotes the traceback.
        last = str(error).rstrip().rpartition("\n")[2]
        refuse(last.partition("ValueError: ")[2] or str(error))
    except OSError as error:
        refuse(f"--config: {error.__cause__ or error}")
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
                refuse(f"config has no field {field!r}; did you mean {hint}?")
        raise


def join_processes() -> None:
    """Joins the other processes of the run, if there are any."""
    try:
        processes.join(_ADDRESS.value, _COUNT.value, _NUMBER.value)
    except ValueError as error:
        fail(str(error), status=2)


def refuse(message: str) -> NoReturn:
    """Ends the run because of its flags; the processes, whose flags may differ, have not joined yet."""
    if not _processes.is_parsed():
        _processes.mark_as_parsed()
    join_processes()
    fail(message, status=2)
