"""Networks whose layers are aggregated: a backbone, and a method as its argument."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from ssm_jax.layers.aggregation import Aggregation
from ssm_jax.layers.channel_attention import CBAM, ECA, SqueezeExcite

CHANNEL_ATTENTION: dict[str, Callable[..., nnx.Module] | None] = {
    "none": None,
    "se": SqueezeExcite,
    "eca": ECA,
    "cbam": CBAM,
}
"""What `aggregated` takes as `channel_attention`."""


def aggregated(
    num_classes: int,
    *,
    backbone: Callable[..., nnx.Module],
    method: type[Aggregation] = Aggregation,
    preset: str = "default",
    aggregation: Mapping[str, Any] | None = None,
    channel_attention: str = "none",
    **network: Any,
) -> nnx.Module:
    """A network with an aggregation of its layers, channel attention in its blocks, or both.

    Args:
        num_classes: number of logits.
        backbone: makes the network.
        method: makes what aggregates a stage's layers; `Aggregation`: nothing does.
        preset: a name in `method.presets`.
        aggregation: arguments of the method besides these.
        channel_attention: `none`, `se`, `eca` or `cbam` (CBAM in ResNets only).
        **network: arguments of the backbone.

    Raises:
        ValueError: for an unknown name, or as backbone and method do.
    """
    for argument, value, known in [
        ("preset", preset, method.presets),
        ("channel_attention", channel_attention, CHANNEL_ATTENTION),
    ]:
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"{argument} must be one of {', '.join(known)}, got {value!r}.")
    aggregation = {} if aggregation is None else aggregation
    if not isinstance(aggregation, Mapping) or (aggregation and method is Aggregation):
        takes = "a dict of arguments" if method is not Aggregation else "left out: nothing aggregates these layers"
        raise ValueError(f"aggregation must be {takes}, got {aggregation!r}.")
    if theirs := {"stage", "dtype", "param_dtype", "rngs"} & set(aggregation):
        raise ValueError(f"aggregation must not have {', '.join(sorted(theirs))}: the network gives its own.")
    if method is not Aggregation:
        network["aggregation"] = functools.partial(method, **{**method.presets[preset], **aggregation})
    if channel_attention != "none":
        network["channel_attention"] = CHANNEL_ATTENTION[channel_attention]
    return backbone(num_classes, **network)
