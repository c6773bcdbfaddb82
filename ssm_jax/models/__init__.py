"""Networks by name."""

import difflib
import fnmatch
from collections.abc import Callable
from typing import Any

from flax import nnx

from ssm_jax.models.isotropic import Isotropic as Isotropic
from ssm_jax.models.isotropic import isotropic_conv2d, isotropic_s4nd

_MODELS: dict[str, Callable[..., nnx.Module]] = {
    "isotropic_conv2d": isotropic_conv2d,
    "isotropic_s4nd": isotropic_s4nd,
}


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` knows and that match a shell pattern, such as `*s4nd*`."""
    return sorted(fnmatch.filter(_MODELS, pattern))


def create_model(name: str, *, num_classes: int, rngs: nnx.Rngs, **overrides: Any) -> nnx.Module:
    """Builds a network by name; `overrides` are arguments of its constructor.

    Raises ValueError for an unknown name (suggesting near ones), an unknown argument, or an impossible value.
    """
    if name not in _MODELS:
        near = difflib.get_close_matches(name, _MODELS, n=3) or list_models()
        raise ValueError(f"unknown model {name!r}; did you mean {' or '.join(map(repr, near))}?")
    try:
        return _MODELS[name](num_classes, **overrides, rngs=rngs)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"model {name!r}: {error}") from error
