"""State dicts, as mappings of names to arrays, from files and to files."""

import functools
import os
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from ssm_jax.pretrained.torch_file import read_torch

_DTYPES = {
    "BF16": jnp.bfloat16,
    "BOOL": np.bool_,
    "C64": np.complex64,
    "F16": np.float16,
    "F32": np.float32,
    "F64": np.float64,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "U64": np.uint64,
}
"""The format's names; `safetensors.numpy` reads no bfloat16."""

_KEYS = ("model", "state_dict", "module")


def read_state(path: str | os.PathLike, *, key: str | None = None) -> dict[str, Any]:
    """The state dict in a `.safetensors` file, or in one of `torch.save`; nothing in a file is ever run.

    See `find_state`. Raises ValueError for a file that cannot be read, or holds no state dict.
    """
    path = epath.Path(path)
    try:
        if path.suffix == ".safetensors":
            return find_state(_read_safetensors(path.read_bytes()), key=key)
        with path.open("rb") as file:
            return read_torch(file, functools.partial(find_state, key=key))
    except (ValueError, safetensors.SafetensorError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def find_state(content: Any, *, key: str | None = None) -> dict[str, Any]:
    """The state dict in what was saved: that itself, or what is under `model`, `state_dict` or `module`.

    `key` says where it is instead, such as `model_ema`. The prefixes that `DataParallel` and `torch.compile` give to
    names are left out, and entries that are no numbers. Raises ValueError if there is none.
    """
    if key is not None:
        if not isinstance(content, Mapping) or key not in content:
            raise ValueError(f"there is nothing under {key!r}, only {_keys(content)}.")
        content = content[key]
    for name in _KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    arrays = {}
    if isinstance(content, Mapping):
        arrays = {name: value for name, value in content.items() if isinstance(name, str) and _is_array(value)}
    if not arrays:
        raise ValueError(f"there is no state dict, not under {', '.join(_KEYS)} either, only {_keys(content)}.")
    return {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in arrays.items()}


def write_safetensors(arrays: Mapping[str, np.ndarray], path: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Writes a `.safetensors` file, all of it or nothing.

    Raises ValueError for a path with another ending, and FileExistsError if the file exists, unless `overwrite`.
    """
    path = epath.Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end with .safetensors, got {path}.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; overwrite=True replaces it.")
    contiguous = {name: np.asarray(value, order="C") for name, value in arrays.items()}
    # Whoever reads the file sees the old one or the new one.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(safetensors.numpy.save(contiguous, {"format": "pt"}))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _read_safetensors(data: bytes) -> dict[str, np.ndarray]:
    arrays = {}
    for name, array in safetensors.deserialize(data):
        if array["dtype"] not in _DTYPES:
            raise ValueError(f"{name} has dtype {array['dtype']}, not one of {', '.join(_DTYPES)}.")
        arrays[name] = np.frombuffer(array["data"], _DTYPES[array["dtype"]]).reshape(array["shape"])
    return arrays


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") or isinstance(value, bool | int | float)


def _keys(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    return ", ".join(sorted(map(str, content))[:10]) or "an empty mapping"
