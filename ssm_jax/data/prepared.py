"""Datasets that TensorFlow Datasets has prepared as array_record files: random access without TensorFlow."""

import dataclasses
import json
import os
import re
from collections.abc import Collection, Mapping
from typing import Any

from etils import epath

from ssm_jax.data.decode import BrokenExampleError

PREPARABLE = ("celeb_a", "cifar10", "cifar100", "imagenet2012")
"""Names that `python -m ssm_jax.data.prepare` takes."""

_BLOCK = 1 << 16  # bytes; array_record files are whole blocks, of which the last tells where the records are


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedSplit:
    """Examples of a split as they are in the files: a dict with encoded images, texts as bytes."""

    title: str
    examples: Any
    """tfds's source."""

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Reads one. Raises BrokenExampleError if its part of the file is damaged."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in [0, {len(self)}), got {index}.")
        try:
            return self.examples[index]
        except RuntimeError as error:  # array_record's: its hashes tell of damage
            raise BrokenExampleError(f"{self.name(index)} cannot be read: {error}") from error

    def name(self, index: int) -> str:
        """Of one example, for messages."""
        return f"example {index} of {self.title}"


def prepared_splits(name: str, dir: str | None, splits: Mapping[str, str]) -> tuple[dict[str, PreparedSplit], Any]:
    """Opens splits of a dataset's newest version, and gives its tfds.features.FeaturesDict too.

    Args:
        name: tfds's.
        dir: folder that has `name`/VERSION/ in it, by default `~/tensorflow_datasets`.
        splits: names to splits in tfds's notation, as `train[:90%]`.

    Raises:
        ValueError: if something is missing, with what it is and how to get it.
    """
    builder = complete_builder(name, newest_version(name, dir), {split.partition("[")[0] for split in splits.values()})
    import tensorflow_datasets as tfds

    decoders: Any = {"image": tfds.decode.SkipDecoding()}
    sources: Any = builder.as_data_source(list(splits.values()), decoders=decoders)
    opened = {
        key: PreparedSplit(f"{name} {split}", source)
        for (key, split), source in zip(splits.items(), sources, strict=True)
    }
    return opened, builder.info.features


def newest_version(name: str, dir: str | None) -> epath.Path:
    """The folder of a prepared dataset's newest version. Raises ValueError if there is none."""
    root = epath.Path(dir or "~/tensorflow_datasets").expanduser()
    folder = root / name
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if versions := [entry for entry in found if re.fullmatch(r"\d+\.\d+\.\d+", entry)]:
        return folder / max(versions, key=lambda version: [*map(int, version.split("."))])
    # tfds writes to incomplete.RANDOM_VERSION, which becomes VERSION when all is there.
    if unfinished := [entry for entry in found if entry.startswith("incomplete.")]:
        raise ValueError(
            f"dir holds an incomplete {name}: {folder / unfinished[0]}, which is being prepared, or was when that was "
            f"stopped; delete it then.{_remedy(name, root)}"
        )
    raise ValueError(
        f"dir holds no prepared {name}: looked for {folder}/VERSION/dataset_info.json. Set it to the folder that has "
        f"{name}/ in it.{_remedy(name, root)}"
    )


def complete_builder(name: str, folder: epath.Path, splits: Collection[str]) -> Any:
    """Opens a version's folder with tfds, after a check that the files of `splits` are there and whole.

    The folder is listed once. Raises ValueError for mistakes that tfds explains badly, or only when it reads: another
    file format, missing splits, missing files, truncated ones.
    """
    file_format = _json(name, folder, "dataset_info.json").get("fileFormat", "tfrecord")
    if file_format != "array_record":
        raise ValueError(
            f"dir holds {name} as {file_format}, which has no random access: {folder}. Prepare it as array_record, in "
            f"another data_dir or after moving that folder away.{_remedy(name, folder.parent.parent)}"
        )
    _json(name, folder, "features.json")
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(folder))
    files = _files(folder)
    for split in sorted(splits):
        if split not in builder.info.splits:
            raise ValueError(
                f"dir holds {name} without the split {split}: {folder} has {', '.join(sorted(builder.info.splits))}. "
                f"Delete that folder and prepare it again, with all splits.{_remedy(name, folder.parent.parent)}"
            )
        shards = sorted(builder.info.splits[split].filenames)
        for problem, bad in (
            ("missing", [shard for shard in shards if shard not in files]),
            ("empty or truncated", [shard for shard in shards if not _whole(files.get(shard))]),
        ):
            if bad:
                more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
                raise ValueError(
                    f"dir holds an incomplete {name}: of the {len(shards)} files of split {split} in {folder}, "
                    f"{len(bad)} {'is' if len(bad) == 1 else 'are'} {problem}: {bad[0]}{more}. Copy them again, or "
                    f"delete that folder and prepare it again.{_remedy(name, folder.parent.parent)}"
                )
    return builder


def _json(name: str, folder: epath.Path, file: str) -> dict[str, Any]:
    try:
        return json.loads((folder / file).read_text())
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"dir holds an incomplete {name}: {folder / file} is missing or is no JSON. Copy it again, or delete that "
            f"folder and prepare it again.{_remedy(name, folder.parent.parent)}"
        ) from error


def _files(folder: epath.Path) -> dict[str, int | None]:
    """Names of the files in a folder to their sizes, which are not asked for in a bucket: a request for each file."""
    if "://" in os.fspath(folder):
        return {path.name: None for path in folder.iterdir()}
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries}


def _whole(size: int | None) -> bool:
    return size is None or (size > 0 and size % _BLOCK == 0)


def _remedy(name: str, root: epath.Path) -> str:
    if name not in PREPARABLE:
        return ""
    return f" To prepare it: python -m ssm_jax.data.prepare {name} --data_dir={root}"
