import os
import re

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from ssm_jax.pretrained.files import find_state, read_state, write_safetensors

DTYPES = [
    *(np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
    *(np.float16, np.float32, np.float64, np.complex64, jnp.bfloat16),
]


def test_safetensors_come_back_with_dtype_and_shape(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {np.dtype(dtype).name: rng.integers(0, 2, (2, 3)).astype(dtype) for dtype in DTYPES}
    arrays |= {"scalar": np.array(3), "empty": np.zeros((0, 2)), "transposed": rng.normal(size=(3, 2)).T}
    write_safetensors(arrays, tmp_path / "a.safetensors")
    back = read_state(str(tmp_path / "a.safetensors"))
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array, strict=True)


def test_files_are_replaced_only_when_asked(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors({"x": np.ones(2)}, path)
    with pytest.raises(FileExistsError, match="overwrite=True replaces it"):
        write_safetensors({"x": np.zeros(2)}, path)
    np.testing.assert_array_equal(read_state(path)["x"], 1)
    write_safetensors({"x": np.zeros(2)}, path, overwrite=True)
    np.testing.assert_array_equal(read_state(path)["x"], 0)


def test_a_file_is_written_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_safetensors({"x": np.ones(2)}, path)

    def fails_midway(self, data):
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError("disk full")

    monkeypatch.setattr(type(epath.Path(path)), "write_bytes", fails_midway)
    with pytest.raises(OSError, match="disk full"):
        write_safetensors({"x": np.zeros(2)}, path, overwrite=True)
    np.testing.assert_array_equal(read_state(path)["x"], 1)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_other_endings_are_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"path must end with \.safetensors, got .*a\.pth"):
        write_safetensors({}, tmp_path / "a.pth")


def test_broken_safetensors_are_named(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors({"x": np.ones(200)}, path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=re.escape(f"{path} cannot be read")):
        read_state(path)
    header = b'{"x":{"dtype":"F8_E5M2","shape":[1],"data_offsets":[0,1]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    with pytest.raises(ValueError, match="x has dtype F8_E5M2, not one of"):
        read_state(path)


STATE = {"a.weight": np.ones(2), "b": np.zeros(3)}


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"model": STATE, "optimizer": {"state": np.ones(3)}, "epoch": 3},
        {"state_dict": STATE, "model_ema": {"a.weight": np.zeros(2)}},
        {"module": STATE},
        {"model": {"module": STATE}},
        {"model": {f"module.{name}": value for name, value in STATE.items()}},
        {f"_orig_mod.module.{name}": value for name, value in STATE.items()},
        {"model": "resnet", "state_dict": STATE | {"note": "text", 3: np.ones(1)}},
    ],
)
def test_the_state_dict_is_found_and_prefixes_of_wrappers_left_out(content):
    assert find_state(content) == STATE


def test_averaged_weights_are_read_when_asked_for():
    content = {"model": STATE, "model_ema": {"module.x": np.ones(1)}}
    assert list(find_state(content, key="model_ema")) == ["x"]
    with pytest.raises(ValueError, match="there is nothing under 'ema', only model, model_ema"):
        find_state(content, key="ema")


@pytest.mark.parametrize(
    ("content", "said"), [({"net": {}, "epoch": "3"}, "epoch, net"), ([1], "a list"), ({}, "an empty mapping")]
)
def test_content_without_a_state_dict_is_described(content, said):
    with pytest.raises(ValueError, match=f"there is no state dict, not under model, state_dict, module.*only {said}"):
        find_state(content)
