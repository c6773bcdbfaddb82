"""From a network over images to one over video (S4ND, section 4.2; I3D, arXiv:1705.07750)."""

import jax.numpy as jnp
from flax import nnx

from ssm_jax.layers.stems import FactorizedConv
from ssm_jax.models.convnext import ConvNeXt
from ssm_jax.pretrained.names import Path


def inflate(images: ConvNeXt, video: ConvNeXt, *, average: bool = False) -> None:
    """Gives a network over video the weights of one over images, in place.

    * Kernels of convolutions are repeated over time; factorised ones become the spatial factor.
    * S4ND's kernels over height and width are those of the images; the kernel over time stays as it is.
    * The classifier stays as it is. Everything else is copied.

    Args:
        images: a network over (height, width).
        video: one of the same widths, depths and mixers over (time, height, width).
        average: divide repeated kernels by their number, so that a video of equal frames gives what one of them did.
            False, as the release has it, leaves the LN after each convolution to take the factor away.

    Raises:
        ValueError: if the networks do not match, listing where; `video` is unchanged then.
    """
    if [len(net.reduction) if isinstance(net, ConvNeXt) else 0 for net in (images, video)] != [2, 3]:
        raise ValueError("images must be a ConvNeXt over two axes and video one over three.")
    source = dict(nnx.to_flat_state(nnx.state(images, nnx.Param)))
    target = dict(nnx.to_flat_state(nnx.state(video, nnx.Param)))
    factorised = {path for path, module in nnx.iter_modules(video) if isinstance(module, FactorizedConv)}
    values, problems, used = {}, [], set()
    for path, variable in target.items():
        if path[0] == "head" or _over_time(path) or (path[:-1] in factorised and path[-1] == "time"):
            continue
        origin = _origin(path, factorised)
        name = ".".join(map(str, path))
        if origin not in source:
            problems.append(f"{name} has no counterpart in images")
            continue
        used.add(origin)
        value = source[origin][...]
        if path[-1] == "kernel" and variable.ndim == value.ndim + 1:
            frames = variable.shape[0]
            value = jnp.broadcast_to(value / (frames if average else 1), (frames, *value.shape))
        if value.shape != variable.shape:
            problems.append(f"{name} is {variable.shape} in video and {value.shape} in images")
        values[path] = variable.replace(jnp.asarray(value, variable.dtype))
    problems += [
        f"{'.'.join(map(str, path))} of images has no place in video"
        for path in source
        if path not in used and path[0] != "head"
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        hint = " Build images with the stem of video, stem='patch'." if "stem." in problems[0] else ""
        raise ValueError(f"images and video do not match: {'; '.join(problems[:5])}{more}.{hint}")
    nnx.update(video, nnx.from_flat_state(values))


def _over_time(path: Path) -> bool:
    """Whether it is of an S4ND kernel over time, the first axis of video."""
    return "kernels" in path and path[path.index("kernels") + 1] == 0


def _origin(path: Path, factorised: set[Path]) -> Path:
    """Where the network over images has what the one over video has at `path`."""
    if "kernels" in path:
        i = path.index("kernels") + 1
        return (*path[:i], path[i] - 1, *path[i + 1 :])
    if path[:-2] in factorised and path[-2] == "space":
        return (*path[:-2], path[-1])
    return path
