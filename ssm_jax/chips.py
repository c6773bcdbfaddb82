"""What accelerators can do, by JAX's name for a device: the denominators of utilisation and of bounds on time.

Figures are those of the vendors' public pages: of TPUs, https://docs.cloud.google.com/tpu/docs/v5e and those beside it
(links of v2 and v3: Jouppi et al., CACM 63(7), 2020; of v4: arXiv:2304.01433), of GPUs, NVIDIA's datasheets, without
sparsity. A device is what `jax.devices()` counts: on TPU v4 and v5p a chip, whose
two TensorCores work as one ("megacore"); on v2, v3 and 7x one of the chip's two TensorCores, with half of the memory;
elsewhere all of a chip.
"""

import fnmatch
import math
from typing import NamedTuple


class Chip(NamedTuple):
    """One device."""

    name: str
    flops: float
    """Operations per second in products of bfloat16 matrices; a multiply-add is two."""
    memory: float
    """Bytes; programs get a little less."""
    bandwidth: float
    """Of its memory, bytes per second."""
    clock: float = math.nan
    """Of a TPU's cores, Hz: `flops` over the operations that the matrix units do in a cycle."""
    interconnect: float = math.nan
    """Bytes per second that a TPU sends to others of its slice, over all links together."""


_GIB = 2**30

TPUS = {
    "v2": Chip("TPU v2", 22.5e12, 8 * _GIB, 0.30e12, 0.70e9, 124e9),
    "v3": Chip("TPU v3", 61.5e12, 16 * _GIB, 0.45e12, 0.94e9, 164e9),
    "v4": Chip("TPU v4", 275e12, 32 * _GIB, 1.2e12, 1.05e9, 300e9),
    "v5e": Chip("TPU v5e", 197e12, 16 * _GIB, 0.819e12, 1.5e9, 200e9),
    "v5p": Chip("TPU v5p", 459e12, 96 * _GIB, 2.765e12, 1.75e9, 600e9),  # "95 GB", but programs get 95.7 GiB
    "v6e": Chip("TPU v6e", 918e12, 32 * _GIB, 1.638e12, 1.75e9, 400e9),
    "tpu7x": Chip("TPU7x", 1153.5e12, 96 * _GIB, 3.69e12, 2.2e9, 300e9),
}
"""By the names that slices have, as in `v5e:16x16`."""

_KINDS = {
    **{"TPU v2": "v2", "TPU v3": "v3", "TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p"},
    **{"TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU v6e": "v6e", "TPU7x": "tpu7x"},
}

_GPUS = {
    "NVIDIA A100 80GB PCIe": Chip("A100 PCIe 80 GB", 312e12, 80e9, 1.935e12),
    "NVIDIA A100-*80GB": Chip("A100 80 GB", 312e12, 80e9, 2.039e12),
    "NVIDIA A100-*": Chip("A100 40 GB", 312e12, 40e9, 1.555e12),
    "NVIDIA A30": Chip("A30", 165e12, 24e9, 0.933e12),
    "NVIDIA A40": Chip("A40", 149.7e12, 48e9, 0.696e12),
    "NVIDIA A10G": Chip("A10G", 70e12, 24e9, 0.600e12),
    "NVIDIA A10": Chip("A10", 125e12, 24e9, 0.600e12),
    "NVIDIA L4": Chip("L4", 121e12, 24e9, 0.300e12),
    "NVIDIA L40S": Chip("L40S", 362e12, 48e9, 0.864e12),
    "NVIDIA H100 PCIe": Chip("H100 PCIe", 756e12, 80e9, 2.0e12),
    "NVIDIA H100 NVL": Chip("H100 NVL", 835e12, 94e9, 3.9e12),
    "NVIDIA H100 *": Chip("H100", 989e12, 80e9, 3.35e12),
    "NVIDIA H200 NVL": Chip("H200 NVL", 835e12, 141e9, 4.8e12),
    "NVIDIA H200": Chip("H200", 989e12, 141e9, 4.8e12),
    "NVIDIA B200": Chip("B200", 2250e12, 180e9, 8.0e12),
    "NVIDIA GeForce RTX 3090": Chip("RTX 3090", 71e12, 24e9, 0.936e12),
    "NVIDIA GeForce RTX 4090": Chip("RTX 4090", 165e12, 24e9, 1.008e12),
}
"""By patterns, of which the first holds. GPUs older than these have no products of bfloat16."""


def chip(device_kind: str) -> Chip | None:
    """The device that `jax.Device.device_kind` names, or None for one that is not known here, such as a CPU."""
    if device_kind in _KINDS:
        return TPUS[_KINDS[device_kind]]
    return next((gpu for pattern, gpu in _GPUS.items() if fnmatch.fnmatchcase(device_kind, pattern)), None)
