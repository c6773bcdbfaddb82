"""The network that a detector sees by: one of `ssm_jax.create_model`, of which the maps after its stages are used."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ssm_jax.layers.norm import LayerNorm
from ssm_jax.models import create_model

STRIDES = (4, 8, 16, 32)
"""Pixels of the image per position of the four maps."""

_EXAMPLE = (1, 224, 224, 3)
"""Images that all networks take."""


class Unused(nnx.Variable):
    """A parameter no more: nothing that is used depends on it."""


class Backbone(nnx.Module):
    """Maps of a network at 1/4, 1/8, 1/16 and 1/32 of the images' size, or some of them.

    What only the classifier needs is taken out, so that all parameters have a gradient. In place of a norm before the
    classifier (Swin, ConvNeXt), there is one after each of the maps, as in mmdetection.

    Attributes:
        network: the network, without its classifier.
        norms: what normalises each map, or None.
        channels: of each map.
        removed: where in the network there were parameters that it does not have here.
    """

    def __init__(
        self,
        name: str,
        *,
        maps: Sequence[int] = (0, 1, 2, 3),
        norm_eval: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **network: Any,
    ):
        """Builds the network.

        Args:
            name: of the network, see `ssm_jax.list_models`.
            maps: which of the four are used.
            norm_eval: let batch norms use their running statistics and leave them as they are, in training too: those
                of a detector's small batches are worse.
            dtype: dtype of matrix products and activations.
            param_dtype: dtype of the parameters.
            rngs: source of the `params` stream.
            **network: arguments of the network besides, such as `drop_path`.

        Raises:
            ValueError: for an unknown name, an impossible argument, or a network without these maps.
        """
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.network: Any = create_model(name, num_classes=1, **dtypes, rngs=rngs, **network)
        self.maps, self.norm_eval = tuple(maps), norm_eval
        shapes, unused = self._trace(name)
        self.channels = tuple(shapes[number][-1] for number in self.maps)
        norm = getattr(self.network, "norm", None)
        each = functools.partial(LayerNorm, epsilon=getattr(norm, "epsilon", 0.0), **dtypes, rngs=rngs)
        self.norms = nnx.List(each(channels) for channels in self.channels) if norm else None
        for path in unused:
            *parents, leaf = path
            owner = functools.reduce(_child, parents, self.network)
            setattr(owner, leaf, Unused(getattr(owner, leaf).get_value()))
        for part in ("head", "norm"):
            if hasattr(self.network, part):
                delattr(self.network, part)
        self.removed = tuple(unused)

    def __call__(
        self, images: Float[Array, "b h w c"], *, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b _ _ _"], ...]:
        """Returns the maps; `rngs` gives the `dropout` stream of stochastic depth."""
        network = self.network
        if self.norm_eval:
            network = nnx.view(network, use_running_average=True, raise_if_not_found=False)
        maps = network.features(images, rngs=rngs)
        chosen = [maps[number] for number in self.maps]
        if self.norms is None:
            return tuple(chosen)
        return tuple(norm(x) for norm, x in zip(self.norms, chosen, strict=True))

    def _trace(self, name: str) -> tuple[list[tuple[int, ...]], list[tuple[Any, ...]]]:
        """The shapes of the network's maps, and the paths of parameters that those in use do not depend on."""
        calm = {"use_running_average": True, "deterministic": True}
        plain = nnx.view(self.network, **calm, remat="none", scan=False, raise_if_not_found=False)
        graphdef, params, rest = nnx.split(plain, nnx.Param, ...)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, rest))
        shapes: list[tuple[int, ...]] = []

        def features(params: Any, rest: Any, images: Array) -> list[Array]:
            maps = nnx.merge(graphdef, params, rest, copy=True).features(images)
            shapes.extend(x.shape for x in maps)
            return [x for number, x in enumerate(maps) if number in self.maps]

        try:
            jaxpr = jax.make_jaxpr(features)(*abstract, jax.ShapeDtypeStruct(_EXAMPLE, jnp.float32)).jaxpr
        except ValueError as error:
            raise ValueError(f"backbone {name!r} must be a network for images of any size: {error}") from error
        expected = [tuple(side // stride for side in _EXAMPLE[1:3]) for stride in STRIDES]
        if [shape[1:3] for shape in shapes] != expected:
            strides = ", ".join(str(_EXAMPLE[1] // shape[1]) for shape in shapes)
            raise ValueError(f"backbone {name!r} must have maps of strides 4, 8, 16 and 32, got {strides}.")
        used = _used(jaxpr)
        paths = [path for path, _ in nnx.to_flat_state(params)]
        return shapes, [path for path, var in zip(paths, jaxpr.invars, strict=False) if var not in used]


def _child(module: Any, key: Any) -> Any:
    return module[key] if isinstance(key, int) else getattr(module, key)


def _used(jaxpr: core.Jaxpr) -> set[core.Var]:
    """The variables of a program that its results depend on."""
    used = {var for var in jaxpr.outvars if isinstance(var, core.Var)}
    for equation in reversed(jaxpr.eqns):
        if not used.isdisjoint(equation.outvars):
            used.update(var for var in equation.invars if isinstance(var, core.Var))
    return used
