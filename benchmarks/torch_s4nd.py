"""S4ND layers in PyTorch, to compare with: that of the authors' release, and two written plainly.

`PlainS4ND` computes as the release does, by a Vandermonde matrix for every head and an N-D FFT over axes padded to
twice their length. `SeparableS4ND` computes as `ssm_jax` does on a CPU, but that it keeps for the backward pass what
`ssm_jax` computes again: what it gains is the algorithm, what `ssm_jax` gains beyond it is XLA.
"""

import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssm_jax import S4ND
from ssm_jax.ops.conv import choose


def official_layer(path: str | Path) -> Callable[..., torch.nn.Module]:
    """The layer's class in a checkout of https://github.com/state-spaces/s4. Raises FileNotFoundError, ImportError."""
    path = Path(path).expanduser().resolve()
    if not (path / "src/models/sequence/modules/s4nd.py").is_file():
        raise FileNotFoundError(f"--torch-s4 must be a checkout of state-spaces/s4: no S4ND module in {path}.")
    sys.path.insert(0, str(path))
    try:
        return importlib.import_module("src.models.sequence.modules.s4nd").S4ND
    except ImportError as error:
        raise ImportError(f"{path}/requirements.txt lists what the release needs: {error}.") from error
    finally:
        sys.path.pop(0)


class PlainS4ND(torch.nn.Module):
    """The convolution and D u of a two-sided `S4ND` with one channel, (batch, heads, *axes), from its parameters."""

    def __init__(self, layer: S4ND):
        super().__init__()
        self.axes = torch.nn.ModuleList(_Axis(kernel) for kernel in layer.kernels)
        self.D = _parameter(layer.D[0])

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """Applies the layer."""
        lengths = u.shape[2:]
        kernels = [axis.kernel(length, axis.vandermonde) for axis, length in zip(self.axes, lengths, strict=True)]
        return self.convolve(u, kernels) + self.D.view(-1, *[1] * len(lengths)) * u

    def convolve(self, u: torch.Tensor, kernels: list[torch.Tensor]) -> torch.Tensor:
        """One FFT over all axes."""
        lengths, dims = u.shape[2:], tuple(range(2, u.ndim))
        sizes = [2 * length for length in lengths]
        spectrum = 1
        for dim, kernel in zip(dims, kernels, strict=True):
            transform = torch.fft.rfft if dim == dims[-1] else torch.fft.fft
            shape = [1, len(kernel), *[1] * len(dims)]
            shape[dim] = -1
            spectrum = spectrum * transform(_circle(kernel)).view(shape)
        y = torch.fft.irfftn(torch.fft.rfftn(u, sizes, dims) * spectrum, sizes, dims)
        return y[(..., *(slice(length) for length in lengths))]


class SeparableS4ND(PlainS4ND):
    """The same by the algorithms of `ssm_jax.ops`."""

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        """Applies the layer."""
        kernels = [axis.kernel(length, axis.two_levels) for axis, length in zip(self.axes, u.shape[2:], strict=True)]
        return self.convolve(u, kernels) + self.D.view(-1, *[1] * (u.ndim - 2)) * u

    def convolve(self, u: torch.Tensor, kernels: list[torch.Tensor]) -> torch.Tensor:
        """Axis by axis, the first from the left and the others from the right."""
        y = u.movedim(0, 2)  # (heads, L_1, batch, L_2 ..)
        for kernel in kernels[1:]:
            y = y.movedim(3, -1)
            y = _convolve_last(y.reshape(len(kernel), -1, y.shape[-1]), kernel).view(y.shape)
        matrices = y.reshape(*y.shape[:2], -1)
        if choose(y.shape[1], "cpu") == "toeplitz":
            y = (_toeplitz(kernels[0]) @ matrices).view(y.shape)
        else:
            y = _convolve_last(matrices.transpose(1, 2), kernels[0]).transpose(1, 2).reshape(y.shape)
        return y.movedim(2, 0)


class _Axis(torch.nn.Module):
    """The kernels of one axis, from the same real parameters as `ssm_jax.layers`."""

    def __init__(self, kernel: Any):
        super().__init__()
        for name in ("inv_dt", "A_real", "A_imag", "B", *(["P"] if hasattr(kernel, "P") else [])):
            setattr(self, name, _parameter(getattr(kernel, name)))
        self.C = _parameter(kernel.C[:, :, 0, 0])  # (2, directions, heads, modes)

    def kernel(self, length: int, sample: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Samples (heads, 2, length); `sample` is how diagonal ones are computed."""
        dt = self.inv_dt.exp()
        A = torch.complex(-self.A_real.exp(), -self.A_imag)
        B, C = torch.complex(*self.B), torch.complex(*self.C)
        if hasattr(self, "P"):
            return self.steps(A, B, C, torch.complex(*self.P), dt, length)
        z = dt * A
        return 2 * sample(C * (B * torch.expm1(z) / A), z, length).movedim(0, 1)

    @staticmethod
    def vandermonde(v: torch.Tensor, z: torch.Tensor, length: int) -> torch.Tensor:
        """Re sum_n v_n exp(l z_n), with all the powers."""
        powers = torch.exp(z[..., None] * torch.arange(length, device=z.device))
        return torch.einsum("khn,hnl->khl", v, powers).real

    @staticmethod
    def two_levels(v: torch.Tensor, z: torch.Tensor, length: int) -> torch.Tensor:
        """The same as a product of two small matrices (`ssm_jax.ops.vandermonde`)."""
        inner = math.ceil(math.sqrt(len(v) * length))
        v = v[:, :, None] * _powers(inner * z, -(-length // inner))
        powers = _powers(z, inner)
        weights = torch.cat([v.real, v.imag], -1).movedim(0, 1).flatten(1, 2)
        product = weights @ torch.cat([powers.real, -powers.imag], -1).transpose(1, 2)
        return product.view(len(z), len(v), -1)[..., :length].movedim(1, 0)

    @staticmethod
    def steps(A, B, C, P, dt, length: int) -> torch.Tensor:
        """Low-rank systems, one step after the other (`ssm_jax.ops.dplr_kernel`)."""
        z = dt / 2
        E = 1 / (1 - z * A)
        probe = P.conj() * E
        overlap = 2 * torch.einsum("rhn,shn->hrs", probe, P.expand_as(probe)).real
        small = torch.eye(len(P), device=P.device) + z[..., None] * overlap
        gain = 2 * z * E * torch.einsum("rhn,hrs->shn", P.expand_as(probe), torch.linalg.inv(small).to(P.dtype))
        x = 2 * z * (E * B - (gain * (probe * B).sum(-1, keepdim=True).real).sum(0))
        decay = (1 + z * A) * E
        states = []
        for _ in range(length):
            states.append(x)
            x = decay * x - (gain * 2 * (probe * x).sum(-1, keepdim=True).real).sum(0)
        return 2 * torch.einsum("khn,lhn->hkl", C, torch.stack(states)).real


def _parameter(x: Any) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(np.asarray(x)))


def _powers(z: torch.Tensor, count: int) -> torch.Tensor:
    """exp(l z), l = 0 .. count-1, by products: (heads, count, modes)."""
    x = torch.exp(z)
    powers = [torch.ones_like(x)]
    for _ in range(count - 1):
        powers.append(powers[-1] * x)
    return torch.stack(powers, 1)


def _circle(kernel: torch.Tensor) -> torch.Tensor:
    """(heads, 2, length) on a circle of 2 length samples: lag l at position l modulo that."""
    return torch.cat([kernel[:, 0], kernel[:, 1].flip(-1)], -1)


def _toeplitz(kernel: torch.Tensor) -> torch.Tensor:
    """The matrices kappa[t - s], (heads, length, length)."""
    length = kernel.shape[-1]
    lags = torch.cat([kernel[:, 1, : length - 1].flip(-1), kernel[:, 0]], -1)  # -(length - 1) .. length - 1
    return lags.flip(-1).unfold(-1, length, 1).flip(1)


def _convolve_last(y: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    length = y.shape[-1]
    if choose(length, "cpu") == "toeplitz":
        return y @ _toeplitz(kernel).transpose(1, 2)
    product = torch.fft.rfft(y, 2 * length) * torch.fft.rfft(_circle(kernel))[:, None]
    return torch.fft.irfft(product, 2 * length)[..., :length]
