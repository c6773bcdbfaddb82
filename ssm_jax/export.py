"""Networks as functions that run without this package, by JAX alone."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from ssm_jax.ops.backend import traced_for

PLATFORMS = {"cpu": "cpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}
"""What functions are exported for, with the backend that each is of."""


def weights(model: nnx.Module) -> dict[str, np.ndarray]:
    """All values of a network, parameters and running statistics, by their names."""
    names, _ = _names(model)
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))
    return dict(zip(names, map(np.asarray, leaves), strict=True))


def export_function(
    model: nnx.Module,
    shape: Sequence[int],
    *,
    dtype: DTypeLike = jnp.float32,
    prepare: Callable[[Array], Array] = lambda images: images,
    **arguments: Any,
) -> jax.export.Exported:
    """A network for evaluation as a function `call(weights, images)` that can be written to a file.

    ```python
    function = export_function(model, (32, 32, 3))
    Path("model.jax_export").write_bytes(bytes(function.serialize()))
    ```

    `jax.export.deserialize` of this JAX, and of its releases in the next six months at least, reads it. The function
    takes what `weights` gives, and any number of images, and gives logits in float32. It runs on all `PLATFORMS`, with
    a program of its own for each of the backends, whose fastest ways to compute differ.

    Args:
        model: the network, or an abstract one (`nnx.eval_shape`).
        shape: of an image, (height, width, channels), or of a video. It is fixed.
        dtype: of the images, as the function takes them.
        prepare: makes the network's input of them.
        **arguments: of the network's call, such as `rate`.

    Raises:
        ValueError: inside of `jax.set_mesh`, whose devices the function would be bound to, and as the network does for
            images of this shape.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        raise ValueError("export_function must be called outside of jax.set_mesh.")
    # A network may have no dropout, or no batch norm.
    model = nnx.view(model, deterministic=True, use_running_average=True, raise_if_not_found=False)
    graphdef, state = nnx.split(model)
    names, structure = _names(model)

    def for_backend(backend: str) -> Callable[[dict[str, Array], Array], Array]:
        def logits(weights: dict[str, Array], images: Array) -> Array:
            with traced_for(backend):
                model = nnx.merge(graphdef, structure.unflatten([weights[name] for name in names]))
                return model(prepare(images), **arguments).astype(jnp.float32)

        return logits

    by_backend = {backend: for_backend(backend) for backend in PLATFORMS.values()}
    by_platform = {platform: by_backend[backend] for platform, backend in PLATFORMS.items()}

    def function(weights: dict[str, Array], images: Array) -> Array:
        return jax.lax.platform_dependent(weights, images, **by_platform)

    (batch,) = jax.export.symbolic_shape("batch")
    leaves = jax.tree.leaves(nnx.to_pure_dict(state))
    values = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    images = jax.ShapeDtypeStruct((batch, *shape), dtype)
    export = jax.export.export(jax.jit(function), platforms=tuple(PLATFORMS))
    return export(dict(zip(names, values, strict=True)), images)


def _names(model: nnx.Module) -> tuple[list[str], Any]:
    """Names of a network's values, `norm.scale`, and the structure of the tree that they are the leaves of."""
    leaves, structure = jax.tree.flatten_with_path(nnx.to_pure_dict(nnx.state(model)))
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves], structure
