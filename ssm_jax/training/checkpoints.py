"""Checkpoints of a run: asynchronous and atomic, the best one and the last ones kept, checked when they are read."""

import contextlib
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from ssm_jax.training.checkpoint_files import (
    FORMAT,
    NAME,
    CheckpointError,
    DamagedCheckpointError,
    Found,
    added_metrics,
    check_fit,
    compare,
    described,
    look,
    note_checksum,
    of_first_process,
    root_cause,
    shapes,
    together,
)
from ssm_jax.training.checksums import checksums
from ssm_jax.training.steps import TrainState
from ssm_jax.version import __version__

_T = TypeVar("_T")

_KEEP_LAST = 2  # one more than needed: should the newest turn out damaged, the one before is there

_PATIENCE = 300  # seconds that processes wait in a save for others, one of which may have failed


def absolute(path: epath.PathLike) -> epath.Path:
    """`path` from the root on, as orbax wants it; a URL such as gs://bucket/run, which `resolve` would break, as is."""
    path = epath.Path(path)
    return path if "://" in str(path) else path.resolve()


def find_checkpoint(path: epath.PathLike) -> tuple[epath.Path, int | None] | None:
    """What a run's workdir, or one of its checkpoints, WORKDIR/checkpoints/STEP, means.

    It is the directory of checkpoints, and the step if one is named; None if `path` is neither.
    """
    path = absolute(path)
    if (path / "checkpoints").is_dir():
        return path / "checkpoints", None
    return (path.parent, int(path.name)) if path.name.isdigit() and path.parent.is_dir() else None


class Checkpoints:
    """The checkpoints in a directory, by step. Use as a context manager: leaving it waits for the last save.

    A save is committed by renaming its directory (on an object store by a file that comes last), so that a process
    killed in the middle of one leaves nothing that would be taken for a checkpoint. Checksums of all arrays are saved
    and compared when they are read. Nothing in the directory is touched before something is saved, so that others may
    look at the checkpoints of a run that goes on.

    With several processes all do the same: what one of them cannot read, none takes.
    """

    def __init__(self, directory: epath.PathLike, *, metric: str = ""):
        """Looks into `directory`, which need not exist.

        The best checkpoint is the one with the largest `metric`, needed only where something is saved. Raises
        CheckpointError if checkpoints are of another format.
        """
        self._directory = epath.Path(directory)
        self._metric = metric
        self._checkpointer: Any = None  # made when something is saved: orbax then cleans up
        self._pending: tuple[int, Any] | None = None
        found = Found(*of_first_process(lambda: look(self._directory)))
        if found.refusal:
            raise CheckpointError(found.refusal)
        self._scores: dict[int, float | None] = dict(found.scores)
        self._damaged: dict[int, str] = dict(found.damaged)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            self._wait()
        except CheckpointError as unsaved:
            if error is None:
                raise
            logging.error("%s", unsaved)  # besides what ended the run
        finally:
            if self._checkpointer is not None:
                with contextlib.suppress(Exception):  # those of the last save, which have been reported
                    self._checkpointer.close()

    @property
    def steps(self) -> list[int]:
        """Steps of all checkpoints that are not known to be damaged, in order. Waits for the last save."""
        self._wait()
        return sorted(self._scores)

    @property
    def last(self) -> int | None:
        """Step of the newest checkpoint. Waits for the last save."""
        return max(self.steps, default=None)

    @property
    def best(self) -> int | None:
        """Step of the checkpoint with the largest metric, the latest of equals. Waits for the last save."""
        self._wait()
        return next(iter(self._by_score()), None)

    def scored(self, step: int) -> bool:
        """Whether there is a checkpoint of `step` with metrics."""
        return self._scores.get(step) is not None

    def _by_score(self) -> list[int]:
        """The best first."""
        scored = [(score, step) for step, score in self._scores.items() if score is not None]
        return [step for _, step in sorted(scored, reverse=True)]

    def save(self, state: TrainState, metrics: dict[str, Any] | None = None) -> None:
        """Starts to save `state` under its step; returns once it has been copied from the devices.

        `metrics` is given if the model was just evaluated. Raises CheckpointError if this save, or the one before,
        cannot be written.
        """
        self._wait()
        step = int(state.step)
        note = {
            "format": FORMAT,
            "version": __version__,
            "metrics": metrics,
            "best_by": self._metric,
            "arrays": shapes(vars(state)),
            "checksums": checksums(vars(state)),
        }
        self._set_damaged_aside()
        self._scores[step] = metrics[self._metric] if metrics else None
        try:
            if jax.process_index() == 0:
                added_metrics(self._directory, step).unlink(missing_ok=True)  # of one that was set aside
            saving = self._opened().save_async(
                step, vars(state), custom_metadata=note | {"checksum": note_checksum(note)}
            )
        except Exception as error:
            raise self._unsaved(step, error) from error
        self._pending = step, saving
        self._scores = {step: self._scores[step] for step in self._kept()}

    def add_metrics(self, step: int, metrics: dict[str, Any]) -> None:
        """Gives a checkpoint that was saved without, as its evaluation was interrupted, its metrics: beside it.

        The checkpoint itself stays as it is, for there may be no other.
        """
        self._wait()
        if jax.process_index() == 0:
            path = added_metrics(self._directory, step)
            written = path.with_suffix(".tmp")
            written.write_text(json.dumps({"metrics": metrics, "best_by": self._metric}))
            written.replace(path)
        self._scores[step] = metrics[self._metric]

    def _kept(self) -> set[int]:
        return {*sorted(self._scores)[-_KEEP_LAST:], *self._by_score()[:1]}

    def _wait(self) -> None:
        if self._pending is None:
            return
        (step, saving), self._pending = self._pending, None
        try:
            saving.result()
        except Exception as error:
            raise self._unsaved(step, error) from error

    def _unsaved(self, step: int, error: Exception) -> CheckpointError:
        del self._scores[step]
        kept = f"the checkpoint of step {max(self._scores)} is kept" if self._scores else "there is none before it"
        return CheckpointError(
            f"the checkpoint of step {step} cannot be saved in {self._directory}: {root_cause(error)}. Free space, or "
            f"mend what this names, and start the same command again; {kept}."
        )

    def _opened(self) -> Any:
        if self._checkpointer is None:
            context = ocp.Context()
            context.asynchronous.timeout_secs = _PATIENCE
            self._checkpointer = ocp.training.Checkpointer(
                self._directory,
                context=context,
                # The training loop decides when to save. (Orbax's policies do not satisfy its protocols for pyright.)
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # pyright: ignore
                preservation_policy=_Preserve(self._kept),  # pyright: ignore
                cleanup_tmp_directories=True,
            )
        return self._checkpointer

    def _set_damaged_aside(self) -> None:
        """Renames what is damaged: it may have to make way for a checkpoint of that step, but nothing is deleted."""
        if not self._damaged:
            return
        if jax.process_index() == 0:
            for step in self._damaged:
                path = self._directory / str(step)
                names = (f"{step}.damaged" + (f"-{i}" if i else "") for i in range(1_000))
                path.rename(next(aside for aside in map(self._directory.joinpath, names) if not aside.exists()))
        self._damaged.clear()
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        if self._checkpointer is not None:
            self._checkpointer.reload()

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """Loads the state of `step`.

        `abstract` has the shape, dtype and sharding of every array (`jax.ShapeDtypeStruct`); the sharding may differ
        from that of the saved one, as may devices and processes. Raises CheckpointError if the step is missing or has
        other arrays, and DamagedCheckpointError if it is not what was saved.
        """
        return TrainState(**self._load(step, lambda there: vars(abstract)))

    def restore_last(self, abstract: TrainState) -> TrainState | None:
        """Loads the newest state, or None if there is none.

        One that is damaged is named in a warning, and the one before it taken. Raises CheckpointError if all are, and
        as `restore` does.
        """
        self._wait()
        candidates = sorted([*self._scores, *self._damaged], reverse=True)
        return self._first(candidates, lambda step: self.restore(abstract, step)) if candidates else None

    def restore_best(self, abstract: TrainState) -> TrainState:
        """Loads the best state; where it is damaged, the next best, as `restore_last`. There has to be one."""
        return self._best(lambda step: self.restore(abstract, step))

    def read_network(self, step: int | None = None) -> dict[str, Any]:
        """Loads `params` and `rest` of a step, or of the best one, whatever their shapes, as NumPy arrays."""

        def network(there: Any) -> dict[str, Any]:
            return {
                name: jax.tree.map(lambda x: np.empty(x.shape, x.dtype), there[name]) for name in ("params", "rest")
            }

        return self._load(step, network) if step is not None else self._best(lambda step: self._load(step, network))

    def _best(self, load: Callable[[int], _T]) -> _T:
        self._wait()
        candidates = self._by_score()
        if not candidates and not self._damaged:
            raise CheckpointError(f"{self._directory} has no evaluated checkpoint; name one, {self._directory}/STEP.")
        return self._first([*self._damaged, *candidates], load)  # of the damaged, none knows how good they were

    def _first(self, candidates: Sequence[int], load: Callable[[int], _T]) -> _T:
        """What `load` gives for the first of the steps that is not damaged."""
        for step, following in zip(candidates, [*candidates[1:], None], strict=True):
            try:
                return load(step)
            except DamagedCheckpointError as error:
                self._damaged[step] = str(error)
                self._scores.pop(step, None)
                if following is None:
                    raise CheckpointError(
                        f"{error} There is no other to fall back to in {self._directory}. Start again in a new "
                        "--workdir, or bring a copy of it back."
                    ) from error
                if jax.process_index() == 0:
                    logging.warning("%s Falling back to the checkpoint of step %d.", error, following)
        raise AssertionError("there is at least one candidate")

    def _load(self, step: int, select: Callable[[Any], Any]) -> Any:
        """Loads the arrays of a step that `select` describes, given a description of all that are there."""
        if step in self._damaged:
            raise DamagedCheckpointError(self._damaged[step])
        if step not in self.steps:
            raise CheckpointError(f"{self._directory} has no checkpoint of step {step}; it has {self.steps}.")
        path = self._directory / str(step)
        note, there = together(lambda: described(path), path)
        wanted = select(there)
        check_fit(wanted, note["arrays"], path)
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        # Each process reads for itself: orbax would let the others wait for one that fails.
        context.multiprocessing.primary_host = jax.process_index()
        context.multiprocessing.active_processes = {jax.process_index()}

        def read() -> Any:
            with context:
                return ocp.load(path, wanted, checkpointable_name=NAME)

        loaded = together(read, path)
        found = checksums(loaded)
        together(lambda: compare(found, note["checksums"]), path)
        return loaded


class _Preserve:
    """Orbax's protocol for what is kept."""

    def __init__(self, kept: Callable[[], set[int]]):
        self._kept = kept

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        kept = self._kept()
        return [checkpoint.step in kept for checkpoint in checkpoints]
