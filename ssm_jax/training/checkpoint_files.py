"""What is in checkpoints, besides arrays, and reading them so that damage is told from what does not fit.

With several processes all of this is agreed upon: what one of them cannot read, none takes.
"""

import contextlib
import gc
import json
import logging
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from ssm_jax.version import __version__

_T = TypeVar("_T")

FORMAT = 1
"""Version of what a checkpoint has: the names, shapes and meaning of a state's arrays, and the note beside them."""

NAME = "state"  # of the arrays, among what orbax may have in a checkpoint


class CheckpointError(ValueError):
    """A checkpoint is missing, does not fit, or cannot be read or written."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is not what was saved."""


class Found(NamedTuple):
    """What is in a directory of checkpoints, as JSON has it."""

    scores: list[tuple[int, float | None]]
    damaged: list[tuple[int, str]]
    refusal: str
    """Why the checkpoints cannot be used, or empty."""


def look(directory: epath.Path) -> Found:
    """Reads the notes of all checkpoints in a directory, which need not exist."""
    found = Found([], [], "")
    try:
        steps = _told(lambda: _committed(directory), directory)
    except CheckpointError as error:
        return found._replace(refusal=str(error))
    for step in steps:
        path = directory / str(step)
        try:
            note, _ = _told(lambda path=path: described(path), path)
            added = added_metrics(directory, step)
            if not note["metrics"] and added.exists():
                note |= _told(lambda added=added: json.loads(added.read_text()), added)
            found.scores.append((step, note["metrics"][note["best_by"]] if note["metrics"] else None))
        except DamagedCheckpointError as error:
            found.damaged.append((step, str(error)))
        except CheckpointError as error:
            return found._replace(refusal=str(error))
    return found


def added_metrics(directory: epath.Path, step: int) -> epath.Path:
    """The file with the metrics of a checkpoint, if they came after it."""
    return directory / f"{step}.metrics.json"


def _committed(directory: epath.Path) -> list[int]:
    """Steps of the saves that came to their ends."""
    if not directory.is_dir():
        return []
    paths = [path for path in directory.iterdir() if re.fullmatch(r"0|[1-9]\d*", path.name)]
    if str(directory).startswith("gs://"):  # where directories cannot be renamed
        paths = [path for path in paths if (path / "commit_success.txt").exists()]
    return sorted(int(path.name) for path in paths)


def described(path: epath.Path) -> tuple[dict[str, Any], Any]:
    """The note in a checkpoint, and its tree with descriptions of arrays."""
    metadata: Any = ocp.metadata(path, NAME)
    note = dict(metadata.custom_metadata or {})
    checksum = note.pop("checksum", None)
    if not note and metadata.commit_timestamp_nsecs is not None:
        writer = "a version of ssm_jax that did not write checksums yet"
    elif checksum != note_checksum(note):
        raise ValueError("its _CHECKPOINT_METADATA is not what was written")
    elif note["format"] != FORMAT:
        writer = f"ssm_jax {note['version']} in format {note['format']}"
    elif note["arrays"] != shapes(metadata.metadata):
        raise ValueError("the arrays that it describes are not those that were written")
    else:
        return note, metadata.metadata
    raise CheckpointError(
        f"checkpoint {path} was written by {writer}; ssm_jax {__version__} reads format {FORMAT}. Go on with "
        "that version, or start again in a new --workdir, where config.weights may be a file that python -m "
        "experiments.export wrote with that version."
    )


def note_checksum(note: dict[str, Any]) -> int:
    """Of the note that goes with the arrays, for the note itself."""
    return zlib.crc32(json.dumps(note, sort_keys=True).encode())


def check_fit(wanted: Any, there: dict[str, str], path: epath.Path) -> None:
    """Raises CheckpointError unless the arrays of each part that is `wanted` are those that are `there`."""
    # Compared here, as orbax reports a misfit as an unknown format, and without naming the array.
    here = shapes(wanted)
    there = {name: shape for name, shape in there.items() if name.partition(".")[0] in wanted}
    misfits = [
        f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
        for name in sorted(there.keys() | here.keys(), key=lambda name: (not name.startswith("params"), name))
        if there.get(name) != here.get(name)
    ]
    if misfits:
        shown = "; ".join(misfits[:5]) + (f"; and {len(misfits) - 5} more" if len(misfits) > 5 else "")
        raise CheckpointError(f"checkpoint {path} does not fit this model in {len(misfits)} arrays: {shown}.")


def shapes(tree: Any) -> dict[str, str]:
    """Shapes of the arrays in a tree by their names, `params.norm.scale`; orbax writes integer keys as strings."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): str(tuple(leaf.shape))
        + ("" if leaf.dtype == np.float32 else f" {leaf.dtype}")
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def compare(found: dict[str, int], saved: dict[str, int]) -> None:
    """Raises ValueError unless the checksums of what was loaded are those that were saved."""
    wrong = [name for name, checksum in found.items() if saved.get(name) != checksum]
    if wrong:
        more = f" and {len(wrong) - 3} other arrays" if len(wrong) > 3 else ""
        raise ValueError(f"{', '.join(wrong[:3])}{more} read otherwise than written")


_NOT_THE_FILES = (ImportError, PermissionError, ConnectionError, TimeoutError, MemoryError, jax.errors.JaxRuntimeError)
_NOT_THE_STORE = r"PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED"


def _told(read: Callable[[], _T], path: epath.Path) -> _T:
    """What `read` gives; any error of it as one about the checkpoint at `path`."""
    with _nothing_told_of_the_rest():
        try:
            return read()
        except CheckpointError:
            raise
        except Exception as error:
            failure = _failure(error, path)
        gc.collect()
    raise failure


@contextlib.contextmanager
def _nothing_told_of_the_rest() -> Iterator[None]:
    """What else orbax has under way when it fails, fails when it is collected; Python would tell a page of each."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    tasks = logging.getLogger("asyncio")
    told, tasks.disabled = tasks.disabled, True
    try:
        yield
    finally:
        sys.unraisablehook, tasks.disabled = hook, told


def _failure(error: BaseException, path: epath.Path) -> CheckpointError:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, _NOT_THE_FILES) or re.search(_NOT_THE_STORE, str(cause)):
            return CheckpointError(f"checkpoint {path} cannot be read: {root_cause(error)}.")
        cause = cause.__cause__ or cause.__context__
    return DamagedCheckpointError(f"checkpoint {path} is damaged: {root_cause(error)}.")


def root_cause(error: BaseException) -> str:
    """Where an error comes from, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}".removeprefix("ValueError: ").rstrip(".")


def together(read: Callable[[], _T], path: epath.Path) -> _T:
    """As `_told`, but where one process fails, all raise its error."""
    result: Any = None
    own: CheckpointError | None = None
    try:
        result = _told(read, path)
    except CheckpointError as error:
        own = error
    told = "" if own is None else json.dumps([isinstance(own, DamagedCheckpointError), str(own)])
    failures = [(*json.loads(text), process) for process, text in enumerate(gathered(told)) if text]
    if failures:
        damaged, message, process = min(failures)  # an error that may pass is not taken for damage
        kind = DamagedCheckpointError if damaged else CheckpointError
        raise kind(f"process {process}: {message}" if process else message) from own
    return result


def of_first_process(make: Callable[[], Any]) -> Any:
    """What `make` gives in the first of all processes: one that may be written as JSON."""
    return json.loads(gathered(json.dumps(make()) if jax.process_index() == 0 else "")[0])


def gathered(text: str) -> list[str]:
    """The texts of all processes."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    padded = np.zeros(max(1, *sizes), np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]
