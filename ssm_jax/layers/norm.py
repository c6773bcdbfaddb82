"""Normalisation as the originals compute it."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ssm_jax.ops.dtypes import at_least_float32

# PyTorch's constants; the two-pass variance because E[x^2] - E[x]^2 loses digits where the mean is large.
LayerNorm = functools.partial(nnx.LayerNorm, epsilon=1e-5, use_fast_variance=False)


class BatchNorm(nnx.Module):
    """Batch normalisation over all axes but the last, with PyTorch's running statistics.

    In training, the batch's biased variance normalises and its unbiased one enters the running variance (Flax's
    `nnx.BatchNorm` has the biased one in both places). Statistics are float32 and those of the whole batch, however
    many devices share it.
    """

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        affine: bool = True,
        scale_init: jax.nn.initializers.Initializer = jax.nn.initializers.ones,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds the parameters and the running statistics.

        Args:
            num_features: size of the last axis.
            momentum: weight of the old running statistics, 1 - PyTorch's `momentum`.
            epsilon: added to the variance.
            affine: multiply by a learned factor and add a learned bias.
            scale_init: of the factor after normalisation; zeros for the last one of a residual branch.
            dtype: dtype of the output; None: the input's.
            param_dtype: dtype of the parameters.
            rngs: source of the `params` stream.
        """
        self.scale = nnx.Param(scale_init(rngs.params(), (num_features,), param_dtype)) if affine else None
        self.bias = nnx.Param(jnp.zeros((num_features,), param_dtype)) if affine else None
        self.mean = nnx.BatchStat(jnp.zeros((num_features,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((num_features,), jnp.float32))
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.use_running_average = False

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Whether to normalise by the running statistics (evaluation) or by the batch's own (training)."""
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def __call__(
        self, x: Float[Array, "b *axes c"], *, where: Bool[Array, " b"] | None = None
    ) -> Float[Array, "b *axes c"]:
        """Normalises; in training also moves the running statistics.

        `where` says which rows, at least one, the batch's own statistics are of, by default all. Raises ValueError in
        training for a single value per channel, which has no variance.
        """
        precise = at_least_float32(x.dtype)
        mean, var = self.mean[...].astype(precise), self.var[...].astype(precise)
        expand = (None,) * (x.ndim - 1)
        x_centred = x.astype(precise) - mean[expand]
        if not self.use_running_average:
            axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
            if count == 1:
                raise ValueError(f"x must have more than one value per channel in training, got shape {x.shape}.")
            rows = None if where is None else where[(..., *expand)]
            if where is not None:
                count = where.sum().astype(precise) * (count // where.size)
            # Both moments in one reading of x; about the running mean, so that no digits are lost where it is large.
            offset = x_centred.mean(axes, where=rows)
            var = jnp.maximum(jnp.square(x_centred).mean(axes, where=rows) - jnp.square(offset), 0.0)
            self._move(self.mean, mean + offset)
            self._move(self.var, var * (count / (count - 1)))
            x_centred -= offset[expand]
        factor = jax.lax.rsqrt(var + self.epsilon)
        if self.scale is not None:
            factor = self.scale[...].astype(precise) * factor
        y = x_centred * factor[expand]
        if self.bias is not None:
            y = y + self.bias[...].astype(precise)[expand]
        return y.astype(self.dtype or x.dtype)

    def _move(self, statistic: nnx.BatchStat, value: Float[Array, " c"]) -> None:
        """Moves a running statistic towards the value of this batch."""
        value = jax.lax.stop_gradient(value).astype(statistic.dtype)
        statistic.set_value(self.momentum * statistic[...] + (1 - self.momentum) * value)
