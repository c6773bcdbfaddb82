"""Settings of all tests: 8 virtual devices, strict types, and the reference data of the project's developers."""

import io
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Before jax is imported: it reads them once.
# Most of the tests' time is compilation, which takes half as long without LLVM's optimizations.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"
os.environ["JAX_PLATFORMS"] = "cpu"
# What one test, or the run before in tree mode, has compiled the others load; the key has all that it depends on.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".jax_cache")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference numbers and data that the developers have beside the project; users do not."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the developers' reference data in {folder}")
    return folder


@pytest.fixture
def mesh():
    """Eight devices that share the batch."""
    from ssm_jax.training.sharding import make_mesh

    mesh = make_mesh({"data": 8})
    with jax.set_mesh(mesh):
        yield mesh


def _prepare(folder, name, *, size, encoding, **splits):
    """Writes a dataset as TensorFlow Datasets prepares it: image i of a split is all i, its label i % 10."""
    import standin
    import tensorflow_datasets as tfds
    from PIL import Image

    image = tfds.features.Image(shape=(size, size, 3), encoding_format=encoding)
    features = tfds.features.FeaturesDict({"image": image, "label": tfds.features.ClassLabel(num_classes=10)})

    def example(i):
        file = io.BytesIO()
        Image.new("RGB", (size, size), (i, i, i)).save(file, encoding)
        file.seek(0)
        return {"image": file, "label": i % 10}

    standin.prepare(folder, name, features, {split: [*map(example, range(count))] for split, count in splits.items()})
    return folder


@pytest.fixture(scope="session")
def cifar10_dir(tmp_path_factory) -> Path:
    """A data folder with a CIFAR-10 of 60 training images (image i is all i, label i % 10) and 10 for testing."""
    folder = tmp_path_factory.mktemp("tensorflow_datasets")
    return _prepare(folder, "cifar10", size=32, encoding="png", train=60, test=10)


@pytest.fixture(scope="session")
def jpeg_dir(tmp_path_factory) -> Path:
    """Likewise, with JPEG files, and with a tiny_imagenet20 of 60 training and 10 validation images."""
    folder = tmp_path_factory.mktemp("tensorflow_datasets")
    _prepare(folder, "cifar10", size=32, encoding="jpeg", train=60, test=10)
    return _prepare(folder, "tiny_imagenet20", size=64, encoding="jpeg", train=60, validation=10)
