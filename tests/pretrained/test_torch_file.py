import argparse
import builtins
import collections
import contextlib
import enum
import functools
import io
import math
import os
import pathlib
import pickle
import re
import subprocess
import sys
import types
import zipfile
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from ssm_jax.pretrained.files import read_state
from ssm_jax.pretrained.torch_file import read_torch

STORAGES = {
    "BFloat16Storage": jnp.bfloat16,
    "BoolStorage": np.bool_,
    "ByteStorage": np.uint8,
    "CharStorage": np.int8,
    "ComplexFloatStorage": np.complex64,
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "IntStorage": np.int32,
    "LongStorage": np.int64,
    "ShortStorage": np.int16,
}


class Tensor:
    """A view of a storage (an array of one axis), as PyTorch has it."""

    def __init__(self, storage, shape, stride, offset=0):
        self.storage, self.shape, self.stride, self.offset = storage, shape, stride, offset

    @classmethod
    def of(cls, array):
        stride = [int(np.prod(array.shape[i + 1 :])) for i in range(array.ndim)]
        return cls(array.reshape(-1), array.shape, tuple(stride))


class Parameter:
    def __init__(self, tensor):
        self.tensor = tensor


def write_torch(file, content, *, protocol=2, order="little"):
    """Writes torch's format; its classes and functions are stubs with its names."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in STORAGES:
        setattr(torch, name, type(name, (), {"__module__": "torch"}))
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        stub = types.FunctionType((lambda *_: None).__code__, {}, name)
        stub.__module__, stub.__qualname__ = "torch._utils", name
        setattr(utils, name, stub)
    storages = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, x):
            if type(x) is np.ndarray:
                key, _ = storages.setdefault(id(x), (str(len(storages)), x))
                name = next(name for name, dtype in STORAGES.items() if np.dtype(dtype) == x.dtype)
                return "storage", getattr(torch, name), key, "cuda:0", x.size
            return None

        def reducer_override(self, x):
            if isinstance(x, Tensor):
                arguments = (x.storage, x.offset, x.shape, x.stride, False, collections.OrderedDict())
                return utils._rebuild_tensor_v2, arguments
            if isinstance(x, Parameter):
                return utils._rebuild_parameter, (x.tensor, True, collections.OrderedDict())
            return NotImplemented

    program = io.BytesIO()
    with mock.patch.dict(sys.modules, {"torch": torch, "torch._utils": utils}):
        Pickler(program, protocol).dump(content)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("weights/data.pkl", program.getvalue())
        archive.writestr("weights/byteorder", order)
        archive.writestr("weights/version", "3\n")
        for key, array in storages.values():
            archive.writestr(f"weights/data/{key}", (array if order == "little" else array.byteswap()).tobytes())


def read(content, **options):
    file = io.BytesIO()
    write_torch(file, content, **options)
    return read_torch(file, lambda content: content)


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("dtype", STORAGES.values(), ids=STORAGES)
def test_numbers_of_every_dtype_are_read(dtype, order):
    array = (np.arange(-3, 3) * 0.5).astype(dtype).reshape(2, 3)
    read_back = read({"x": Tensor.of(array)}, order=order)["x"]
    assert read_back.dtype == dtype
    np.testing.assert_array_equal(read_back, array)


STRIDES = {
    "transposed": ((3, 2), (1, 3), 0),
    "slice": ((2, 2), (3, 1), 1),
    "every second": ((3,), (2,), 1),
    "expanded": ((4, 3), (0, 1), 3),
    "scalar": ((), (), 5),
    "empty": ((0, 3), (3, 1), 0),
}


@pytest.mark.parametrize(("shape", "stride", "offset"), STRIDES.values(), ids=STRIDES)
def test_views_of_a_storage_have_its_numbers_at_offset_and_strides(shape, stride, offset):
    storage = np.arange(6.0)
    x = read({"x": Tensor(storage, shape, stride, offset)})["x"]
    assert x.shape == shape
    for index in np.ndindex(*shape):
        assert x[index] == storage[offset + sum(i * step for i, step in zip(index, stride, strict=True))]


def test_tensors_of_one_storage_share_memory():
    storage = np.arange(6.0)
    x = read({"x": Tensor(storage, (6,), (1,)), "y": Tensor(storage, (2, 3), (3, 1)), "z": Tensor.of(np.arange(6.0))})
    assert np.shares_memory(x["x"], x["y"])
    assert not np.shares_memory(x["x"], x["z"])


def test_parameters_are_their_tensors():
    np.testing.assert_array_equal(read({"x": Parameter(Tensor.of(np.ones(2)))})["x"], [1, 1])


IMPOSSIBLE = {
    "beyond the end": ((7,), (1,), 0),
    "beyond by offset": ((1,), (1,), 6),
    "beyond by stride": ((2, 2), (6, 1), 0),
    "before the start": ((1,), (1,), -1),
    "backwards": ((3,), (-1,), 4),
    "negative size": ((-1,), (1,), 0),
    "too few strides": ((2, 3), (1,), 0),
    "no numbers": ((1.5,), (1,), 0),
}


@pytest.mark.parametrize(("shape", "stride", "offset"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_views_that_reach_beyond_their_storage_are_rejected(shape, stride, offset):
    with pytest.raises(ValueError, match="it has a tensor"):
        read({"x": Tensor(np.arange(6.0), shape, stride, offset)})


class Node(dict):
    """As a node of yacs."""

    def __setstate__(self, state):
        raise AssertionError("runs")


class Items(list):
    def append(self, item):
        raise AssertionError("runs")


class Color(enum.Enum):
    RED = 1


class Slots:
    __slots__ = ("a",)


def strange():
    node, slots = Node(a=1), Slots()
    node.name, slots.a = "node", 1
    return {
        "namespace": argparse.Namespace(lr=0.1, nested=argparse.Namespace()),
        "node": node,
        "items": Items([1, 2, 3]),
        "set": {1, 2},
        "enum": Color.RED,
        "slots": slots,
        "default": collections.defaultdict(list, {"a": [1]}),
        "path": pathlib.PurePosixPath("a/b"),
        "partial": functools.partial(print, 1),
        "function": math.sqrt,
        "class": Color,
        "range": range(3),
        "complex": 1j,
        "bytes": b"abc",
        "number": np.float64(3.0),
    }


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", strange())
def test_other_objects_do_not_keep_weights_from_being_read(name, protocol):
    content = {"before": strange()[name], "model": {"x": Tensor.of(np.ones(2))}, "after": strange()[name]}
    file = io.BytesIO()
    write_torch(file, content, protocol=protocol)
    np.testing.assert_array_equal(read_torch(file, lambda content: content["model"])["x"], [1, 1])


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(path):
    touch = f"__import__('pathlib').Path({str(path)!r}).touch()"
    return {
        "os.system": Call(os.system, f"touch {path}"),
        "subprocess": Call(subprocess.call, ["touch", str(path)]),
        "eval": Call(builtins.eval, touch),
        "exec": Call(builtins.exec, touch),
        "getattr": None,  # below
        "in a state": Call(argparse.Namespace, Call(builtins.exec, touch)),
        "as a key": {Call(builtins.exec, touch): 1},
    }


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", attacks(pathlib.Path()))
def test_what_a_pickle_would_run_does_not_run(tmp_path, name, protocol):
    mark = tmp_path / "ran"
    attack = attacks(mark)[name]
    if attack is None:
        # getattr(__import__("os"), "system")("touch ..."), by hand: `__reduce__` wants a function with a name.
        program = b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(Vos\ntRVsystem\ntR(Vtouch %s\ntR." % str(mark).encode()
    else:
        program = pickle.dumps({"model": {"x": 1.0}, "attack": attack}, protocol)
    try:
        pickle.loads(program)
    except TypeError:
        assert name == "in a state"  # what the call returned is no state
    assert mark.exists(), "the test tests nothing"
    mark.unlink()
    file = tmp_path / "weights.pth"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("weights/data.pkl", program)
    try:
        assert read_state(file) == {"x": 1.0}
    except ValueError as error:
        assert "cannot be read" in str(error)  # noqa: PT017
    assert not mark.exists()


@pytest.mark.parametrize("state", [b"}Va\nI1\ns", b"(N}V__defaults__\n(I1\nI2\nI3\nI4\nI5\ntst"], ids=["dict", "slots"])
@pytest.mark.parametrize("name", ["collections OrderedDict", "torch._utils _rebuild_tensor_v2", "builtins list"])
def test_pickles_cannot_change_what_they_name(name, state):
    """An instruction of pickles sets attributes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.pkl", b"c%s\n%sb." % (name.replace(" ", "\n").encode(), state))
    with contextlib.suppress(ValueError):
        read_torch(file, lambda content: {})
    assert not hasattr(collections.OrderedDict, "a")
    np.testing.assert_array_equal(read({"x": Tensor.of(np.ones(2))})["x"], [1, 1])


BROKEN = {
    "no pickle": b"",
    "cut": b"\x80\x02}q\x00(X\x05",
    "no instruction": b"\xff\xff",
    "a storage of another kind": b"(Vstorage\nI1\nV0\ntQ.",
    "a persistent number": b"I1\nQ.",
    "a storage without a file": b"ctorch._utils\n_rebuild_tensor_v2\n"
    b"((Vstorage\nctorch\nFloatStorage\nV7\nVcpu\nI1\ntQI0\n(I1\nt(I1\nttR.",
}


@pytest.mark.parametrize("program", BROKEN.values(), ids=BROKEN)
def test_broken_files_are_rejected(tmp_path, program):
    file = tmp_path / "weights.pth"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("weights/data.pkl", b"(dVmodel\n(dVx\n" + program.removesuffix(b".") + b"ss.")
    with pytest.raises(ValueError, match=re.escape(f"{file} cannot be read")):
        read_state(file)


def test_other_formats_are_named_with_how_to_convert_them(tmp_path):
    file = tmp_path / "weights.pth"
    file.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2))
    with pytest.raises(ValueError, match=r"before 1\.6.*torch\.save\(torch\.load\(.*weights_only=True"):
        read_state(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("weights/data.pkl", b"")
        archive.writestr("weights/constants.pkl", b"")
    with pytest.raises(ValueError, match=r"TorchScript.*torch\.jit\.load\(.*state_dict"):
        read_state(file)
    file.write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"not a file of torch\.save"):
        read_state(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("something.txt", b"")
    with pytest.raises(ValueError, match=r"not a file of torch\.save"):
        read_state(file)


def test_only_the_tensors_of_the_state_dict_are_read(tmp_path):
    file = tmp_path / "weights.pth"
    write_torch(file, {"optimizer": {"y": Tensor.of(np.zeros(3))}, "model": {"x": Tensor.of(np.ones(2))}})
    with mock.patch.object(zipfile.ZipFile, "read", autospec=True, side_effect=zipfile.ZipFile.read) as reads:
        read_state(file)
    names = [call.args[1] for call in reads.call_args_list]
    assert [name for name in names if "/data/" in name] == ["weights/data/1"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_files_of_pytorch_are_read(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.BatchNorm2d(4)).to(torch.bfloat16)
    x = torch.arange(6.0).reshape(2, 3)
    tensors = {"t": x.t(), "row": x[1], "half": x.half(), "long": x.long(), "bool": x > 2, "p": torch.nn.Parameter(x)}
    content = {"model": net.state_dict() | tensors, "args": argparse.Namespace(a=1), "device": torch.device("cpu")}
    torch.save(content, tmp_path / "weights.pth")
    state = read_state(tmp_path / "weights.pth")
    assert state.keys() == content["model"].keys()
    for name, value in content["model"].items():
        assert str(state[name].dtype) == str(value.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(np.asarray(state[name], np.float64), value.double().detach().numpy())
    other = tmp_path / "other.pth"
    torch.save(content, other, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"before 1\.6"):
        read_state(other)
    torch.jit.script(net).save(other)
    with pytest.raises(ValueError, match="TorchScript"):
        read_state(other)
