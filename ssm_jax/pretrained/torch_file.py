"""What `torch.save` wrote, without PyTorch and without running anything that the file says.

A file of PyTorch since 1.6 is a zip archive: `data.pkl`, a pickle of the saved object, and beside it the numbers of
every storage, which the pickle refers to. A pickle is a program that may name any function and call it. This reader
knows the few names that tensors are made of; any other becomes a class that does nothing.
"""

import math
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

_DTYPES = {
    "BFloat16Storage": jnp.bfloat16,
    "BoolStorage": np.bool_,
    "ByteStorage": np.uint8,
    "CharStorage": np.int8,
    "ComplexDoubleStorage": np.complex128,
    "ComplexFloatStorage": np.complex64,
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "IntStorage": np.int32,
    "LongStorage": np.int64,
    "ShortStorage": np.int16,
}


class Unread:
    """Stands for an object that is not read, whatever it is made of."""

    def __new__(cls, *args: Any, **kwargs: Any):
        """Takes the arguments of any class or function."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any): ...

    def _ignore(self, *args: Any): ...

    __setstate__ = __setitem__ = append = extend = add = _ignore  # all that a pickle does to an object


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype


class _Tensor(NamedTuple):
    """Where the numbers of a tensor are: the pickle makes these, and has no hand in reading them."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def read_torch(file: Any, find: Callable[[Any], Mapping[str, Any]]) -> dict[str, Any]:
    """The part of a saved object that `find` gives, with NumPy arrays for tensors; no other tensors are read.

    `file` is open for reading bytes. Tensors of one storage share memory; bfloat16 is JAX's. What is not a tensor, a
    container, a number or a string is `Unread`. Raises ValueError for a broken file, and for one in another format,
    saying how to convert it.
    """
    if not zipfile.is_zipfile(file):
        file.seek(0)
        if re.match(rb"\x80.\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19", file.read(16), re.DOTALL):  # its magic number
            raise ValueError(
                "it has the format of PyTorch before 1.6. To convert it: "
                "torch.save(torch.load(old, map_location='cpu', weights_only=True), new)."
            )
        raise ValueError("it is not a file of torch.save, or not all of one.")
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        roots = [name.removesuffix("data.pkl") for name in names if re.fullmatch(r"([^/]+/)?data\.pkl", name)]
        if len(roots) != 1:
            raise ValueError("it is not a file of torch.save.")
        (root,) = roots
        if f"{root}constants.pkl" in names:
            raise ValueError(
                "it is a TorchScript program. To convert it: "
                "torch.save(torch.jit.load(old, map_location='cpu').state_dict(), new)."
            )
        try:
            with archive.open(f"{root}data.pkl") as program:
                content = _Unpickler(program).load()
        except (pickle.UnpicklingError, AttributeError, EOFError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"its pickle is broken: {error}") from error
        found = find(content)
        order = archive.read(f"{root}byteorder").decode() if f"{root}byteorder" in names else sys.byteorder
        storages: dict[_Storage, np.ndarray] = {}
        for tensor in found.values():
            if isinstance(tensor, _Tensor) and tensor.storage not in storages:
                key, dtype = tensor.storage
                if f"{root}data/{key}" not in names:
                    raise ValueError(f"its storage {key} is missing.")
                numbers = np.frombuffer(archive.read(f"{root}data/{key}"), dtype)
                storages[tensor.storage] = numbers if order == sys.byteorder else numbers.byteswap()
    return {
        name: _view(storages[value.storage], value) if isinstance(value, _Tensor) else value
        for name, value in found.items()
    }


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _DTYPES:
            return type(name, (Unread,), {"dtype": np.dtype(_DTYPES[name])})
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: (
                _Tensor(storage, offset, size, stride) if isinstance(storage, _Storage) else Unread()
            )
        if module == "torch._utils" and name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return lambda tensor, *_: tensor
        return type(name, (Unread,), {})

    def persistent_load(self, pid: Any) -> Any:
        _, storage_type, key, *_ = pid
        return _Storage(key, storage_type.dtype) if hasattr(storage_type, "dtype") else Unread()


def _view(numbers: np.ndarray, tensor: _Tensor) -> np.ndarray:
    """The part of a storage that a tensor is; raises ValueError where it reaches beyond, as NumPy would not see it."""
    _, offset, shape, stride = tensor
    sizes = [*shape, *stride, offset]
    if len(shape) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in sizes):
        raise ValueError(f"it has a tensor of shape {shape}, stride {stride} and offset {offset}.")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if math.prod(shape) and last >= len(numbers):
        raise ValueError(f"it has a tensor that needs {last + 1} numbers of a storage of {len(numbers)}.")
    steps = [step * numbers.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(numbers[offset:], shape, steps, writeable=False)
