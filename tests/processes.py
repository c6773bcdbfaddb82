"""The command line, with a network small enough for tests, as one process or as several that find each other."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

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
"""Makes configs/s4nd/digits.py small."""

PATIENCE = 240
"""Seconds that processes have, on a machine on which other tests run."""

# What XLA's library for collectives prints, piece by piece from several threads, so that pieces of lines get mixed.
GLOO = re.compile(r"Gloo|is connected to|peer ranks|^[\s\d]*$")


class Command:
    """`python -m MODULE` with the tiny config, as a process of its own."""

    def __init__(self, module="experiments.train", *, config="configs/s4nd/digits.py", tiny=True):
        self.module = module
        given = [f"--config={config}"] if config else []
        fields = TINY if tiny else {}
        self.arguments = given + [f"--config.{name}={value}" for name, value in fields.items()]

    def start(self, *arguments, devices=1, start_new_session=False, **environment) -> subprocess.Popen:
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
            start_new_session=start_new_session,
        )

    def run(self, *arguments, **options) -> subprocess.CompletedProcess:
        process = self.start(*arguments, **options)
        [(output, errors)] = outputs([process])
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def as_open_mpi(rank, size, port):
    """What mpirun tells the processes that it starts, and where the first one listens."""
    return {
        "OMPI_MCA_orte_hnp_uri": f"1531576320.0;tcp://127.0.0.1:{port}",
        "OMPI_COMM_WORLD_SIZE": str(size),
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    }


def as_told(rank, size, port):
    """The flags that say the same."""
    return [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={size}", f"--process_id={rank}"]


def run_as_two(command, *arguments, **environment):
    """Runs a command in two processes of four devices each; gives (status, output, errors) of both."""
    port = free_port()
    return ended(
        [command.start(*arguments, devices=4, **as_open_mpi(rank, 2, port), **environment) for rank in range(2)]
    )


def run_as_four(command, *arguments, of_some=(), some=(), **environment):
    """Likewise in four of two devices each, told by flags; `some` of them, by number, get the arguments `of_some`."""
    port = free_port()
    return ended(
        [
            command.start(
                *arguments, *as_told(rank, 4, port), *(of_some if rank in some else ()), devices=2, **environment
            )
            for rank in range(4)
        ]
    )


def ended(processes):
    """Waits for processes; gives (status, output, errors) of each."""
    return [
        (process.returncode, "".join(line for line in output.splitlines(True) if not GLOO.search(line)), errors)
        for process, (output, errors) in zip(processes, outputs(processes), strict=True)
    ]


def outputs(processes):
    """Waits for processes; gives (output, errors) of each. None outlives it: if they take too long, it tells errors."""
    until = time.monotonic() + PATIENCE
    try:
        return [process.communicate(timeout=max(0, until - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired as late:
        for process in processes:
            process.kill()
        errors = "\n".join(process.communicate()[1] for process in processes)
        raise AssertionError(f"{late}; errors until then:\n{errors}") from late
    finally:
        for process in processes:
            process.kill()
            process.wait()
