"""TPU slices by name, to compile for on any machine, without a TPU."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

_PODS = {
    **{"v2": (2, 256), "v3": (2, 1024), "v4": (3, 4096), "v5e": (2, 256)},
    **{"v5p": (3, 8960), "v6e": (2, 256), "tpu7x": (3, 9216)},
}
"""Axes of a slice, and chips in the largest one."""

_CONFIGS = {"v4": "megacore"}
"""Where a slice that is described has other devices than a real one in JAX, by default: there a device is a chip."""

ALLOWED = (
    "CHIP:AxB of v2, v3, v5e or v6e, as in v5e:16x16, or CHIP:AxBxC of v4, v5p or tpu7x, as in v5p:4x4x4; "
    "A and B are even, or all 1; the largest are "
    + ", ".join(f"{name} {chips} chips" for name, (_, chips) in _PODS.items())
)
"""Names of slices."""


def tpu_devices(name: str, slices: int = 1) -> Sequence[jax.Device]:
    """The devices of TPU slices such as `v5e:16x16`, which need not exist.

    Of them a mesh can be made and programs compiled for it, in the context `ssm_jax.ops.backend.traced_for("tpu")`.

    This makes the process one that runs on CPUs, if JAX has not been used in it yet.

    Raises:
        ModuleNotFoundError: without libtpu, the compiler.
        ValueError: for a name of no slice, or less than one of them.
    """
    chip, _, shape = name.partition(":")
    sizes = [int(size) for size in shape.split("x")] if re.fullmatch(r"\d+(x\d+)*", shape) else []
    axes, most = _PODS.get(chip, (0, 0))
    if len(sizes) != axes or math.prod(sizes) > most or not (math.prod(sizes) == 1 or _even(sizes)):
        raise ValueError(f"topology must be {ALLOWED}, got {name!r}.")
    if slices < 1:
        raise ValueError(f"slices must be at least 1, got {slices}.")
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError("Compiling for TPUs needs libtpu; install it with pip install -e '.[tpu]'.")
    os.environ.update(
        TPU_ACCELERATOR_TYPE="v5litepod-4",  # any: else it looks for the machine's
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_SKIP_MDS_QUERY="1",  # else it asks the cloud what machine this is
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # else one process at a time
    )
    jax.config.update("jax_platforms", "cpu")  # or JAX looks for a TPU
    bounds = (1, 1, 1) if math.prod(sizes) == 1 else (2, 2, 1)
    options = {"chip_config_name": _CONFIGS[chip]} if chip in _CONFIGS else {}
    try:
        described = topologies.get_topology_desc(
            name, "tpu", chips_per_host_bounds=bounds, num_slices=slices, **options
        )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"topology must be {ALLOWED}, got {name!r}: {error}") from error
    return described.devices


def _even(sizes: Sequence[int]) -> bool:
    """Whether hosts of 2 x 2 chips fill a slice."""
    return min(sizes) > 0 and all(size % 2 == 0 for size in sizes[:2])
