r"""Downloads a dataset and writes it as array_record files, for `load_dataset`. TensorFlow is not needed.

    python -m ssm_jax.data.prepare cifar10 --data_dir=FOLDER

Names are celeb_a, cifar10, cifar100 and imagenet2012; FOLDER is ~/tensorflow_datasets by default. TensorFlow Datasets
does the work. What it cannot download it finds in FOLDER/downloads/manual.
"""

import contextlib
import functools
import io
import os
import sys
import tarfile
import types
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
from absl import app, flags, logging
from etils import epath

from ssm_jax.data.datasets import Dataset, load_dataset
from ssm_jax.data.prepared import PREPARABLE

_RETRIES = 3  # of each download; tfds's ten take minutes to find out that there is no network


class PrepareError(RuntimeError):
    """A dataset cannot be prepared; the message says why and what to do."""


def prepare(name: str, data_dir: epath.PathLike) -> bool:
    """Prepares one of `PREPARABLE` in `data_dir`. False if it was there already: then nothing is done.

    Raises:
        PrepareError: if that fails. Nothing is left then but files that were downloaded whole, for the next time.
    """
    import tensorflow_datasets as tfds

    root = epath.Path(data_dir).expanduser()
    builder_class: Any = tfds.builder_cls(name)
    if (root / name / str(builder_class.VERSION)).exists():  # which tfds takes for a prepared one, whatever is in it
        try:
            load_dataset(name, str(root))
        except ValueError as error:
            raise PrepareError(str(error)) from error
        return False
    manual = root / "downloads" / "manual"
    if builder_class.MANUAL_DOWNLOAD_INSTRUCTIONS:
        _check_manual_files(builder_class, manual)
    builder = builder_class(data_dir=str(root), file_format="array_record")
    builder._generate_examples = _with_pillow_images(builder._generate_examples)
    try:
        with _no_leftovers(root, name), _without_tensorflow():
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    except _expected_errors() as error:
        files = [f"{info.filename} from {url}" for url, info in builder.url_infos.items() if info.filename]
        hint = f" What cannot be downloaded can be put into {manual} by hand: {', '.join(files)}." if files else ""
        raise PrepareError(f"{name} cannot be prepared: {str(error).rstrip('.')}.{hint}") from error
    return True


def _expected_errors() -> tuple[type[Exception], ...]:
    """Of network, disk, and files that are not what they should be."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
    from tensorflow_datasets.core.download.extractor import ExtractError

    archives = tarfile.TarError, zipfile.BadZipFile, ExtractError
    # Of a page of Google Drive, to which celeb_a's addresses lead, tfds makes a ValueError if it has no link to a file,
    # and an ImportError if there is no Beautiful Soup to read it with.
    return tfds.download.DownloadError, NonMatchingChecksumError, OSError, ValueError, ImportError, *archives


def _check_manual_files(builder_class: Any, manual: epath.Path) -> None:
    """Raises PrepareError unless all files that one has to log in for are there, whole."""
    problems = []
    for url, info in builder_class.url_infos.items():
        path = manual / url.rpartition("/")[2]
        if not path.exists():
            problems.append(f"{path.name} is missing")
        elif (size := path.stat().length) != info.size:
            problems.append(f"{path.name} has {size:,} bytes of {info.size:,}")
    if problems:
        instructions = " ".join(builder_class.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
        raise PrepareError(
            f"{builder_class.name} has files that cannot be downloaded without a login. In {manual}, which is tfds's "
            f"manual_dir, {' and '.join(problems)}. TensorFlow Datasets says: {instructions}"
        )


def _with_pillow_images(generate: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Has tfds encode arrays as it does Pillow's images, for which it does not use TensorFlow."""
    from PIL import Image

    @functools.wraps(generate)
    def examples(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for key, example in generate(*args, **kwargs):
            image = example["image"]
            yield key, {**example, "image": Image.fromarray(image) if isinstance(image, np.ndarray) else image}

    return examples


@contextlib.contextmanager
def _without_tensorflow() -> Iterator[None]:
    """Gives tfds the few functions for files and images that it takes from TensorFlow."""
    from tensorflow_datasets.core import utils
    from tensorflow_datasets.core.download import downloader
    from tensorflow_datasets.core.utils import lazy_imports_utils

    with contextlib.ExitStack() as opened:

        def open_file(path: epath.PathLike, mode: str = "r") -> Any:
            file = epath.Path(path).open(mode)
            # TensorFlow's files can be read after their `with` block, which celeb_a's members of a zip file rely on.
            return file if "w" in mode else contextlib.nullcontext(opened.enter_context(file))

        gfile = types.SimpleNamespace(GFile=open_file, exists=os.path.exists)
        tensorflow = types.SimpleNamespace(
            io=types.SimpleNamespace(gfile=gfile), compat=types.SimpleNamespace(as_text=str)
        )
        # All of tfds's modules share one object that stands for TensorFlow and imports it, as `_module`, when needed.
        opened.enter_context(_replaced(lazy_imports_utils.tensorflow, _module=tensorflow))
        images = {"jpeg_cmyk_to_rgb": _rgb_jpeg, "png_to_jpeg": _rgb_jpeg}  # ImageNet has 23 such files
        opened.enter_context(_replaced(utils, **images))
        opened.enter_context(_replaced(downloader, MAX_RETRIES=_RETRIES))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, **values: Any) -> Iterator[None]:
    namespace = owner.__dict__  # not setattr, which the object that stands for TensorFlow hands on
    before = {name: namespace[name] for name in values if name in namespace}
    namespace.update(values)
    try:
        yield
    finally:
        for name in values:
            del namespace[name]
        namespace.update(before)


def _rgb_jpeg(image: bytes, quality: int = 100) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.open(io.BytesIO(image)).convert("RGB").save(file, "JPEG", quality=quality)
    return file.getvalue()


@contextlib.contextmanager
def _no_leftovers(root: epath.Path, name: str) -> Iterator[None]:
    """Removes what is left of a download, an extraction or a preparation that fails or is stopped."""

    def temporary() -> set[epath.Path]:
        patterns = "downloads/*/*.tmp.*", "downloads/extracted/incomplete.*", f"{name}/incomplete.*"
        return {path for pattern in patterns for path in root.glob(pattern)}

    before = temporary()  # of another process, perhaps
    try:
        yield
    except BaseException:
        for path in temporary() - before:
            path.rmtree(missing_ok=True)
        if (root / name).exists() and not any((root / name).iterdir()):
            (root / name).rmdir()
        raise


def _description(dataset: Dataset) -> str:
    sizes = [f"{len(source):,} {split}" for split, source in dataset.splits.items()]
    return f"{dataset.title}, {dataset.num_classes} classes, {', '.join(sizes)} examples"


def main(argv: Sequence[str]) -> None:
    """The command."""
    if len(argv) != 2 or argv[1] not in PREPARABLE:
        got = " ".join(argv[1:]) or "nothing"
        _fail(f"give the name of one dataset, {', '.join(PREPARABLE)}, got {got}.", status=2)
    name, data_dir = argv[1], flags.FLAGS.data_dir
    logging.set_verbosity(logging.ERROR)  # urllib3 warns of each retry
    try:
        done = prepare(name, data_dir)
        print(f"{'prepared' if done else 'already there'}: {_description(load_dataset(name, data_dir))} in {data_dir}")
    except PrepareError as error:
        _fail(str(error), status=1)
    except KeyboardInterrupt:
        _fail("stopped; the same command starts again with the files that were downloaded whole.", status=130)


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _fail(str(error), status=2)


def _fail(message: str, *, status: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)  # a regular exit waits for downloads in other threads


if __name__ == "__main__":
    flags.DEFINE_string("data_dir", "~/tensorflow_datasets", "Folder of prepared datasets.")
    app.run(main, flags_parser=_parse)
