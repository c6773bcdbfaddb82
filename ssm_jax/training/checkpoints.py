"""Checkpoints of a run: asynchronous and atomic, the best one and the last ones kept."""

from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from ssm_jax.training.steps import TrainState

_policies = ocp.training.preservation_policies
_KEEP_LAST = 2  # one more than needed: should the newest turn out damaged, the one before is there


class CheckpointError(ValueError):
    """A checkpoint is missing or does not fit."""


class Checkpoints:
    """The checkpoints in a directory, by step. Use as a context manager: leaving it waits for the last save.

    A save is committed by renaming its directory, so that a process killed in the middle of one leaves nothing that
    would be taken for a checkpoint.
    """

    def __init__(self, directory: epath.PathLike, *, metric: str):
        """Opens or creates `directory`; the best checkpoint is the one with the largest `metric`."""
        self._directory = epath.Path(directory)
        self._metric = metric
        best = _policies.BestN(get_metric_fn=lambda m: m[metric], n=1, keep_checkpoints_without_metrics=False)
        self._checkpointer = ocp.training.Checkpointer(
            self._directory,
            # The training loop decides when to save. (Orbax's own policies do not satisfy its protocols for pyright.)
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # pyright: ignore
            preservation_policy=_policies.AnyPreservationPolicy([_policies.LatestN(_KEEP_LAST), best]),  # pyright: ignore
            cleanup_tmp_directories=True,
        )
        self._pending = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._checkpointer.close()

    def _committed(self) -> list[Any]:
        """All checkpoints, once the save under way has ended: orbax lists it before it is there."""
        if self._pending is not None:
            self._pending.result()
        return sorted(self._checkpointer.checkpoints, key=lambda checkpoint: checkpoint.step)

    @property
    def steps(self) -> list[int]:
        """Steps of all checkpoints, in order. Waits for the last save."""
        return [checkpoint.step for checkpoint in self._committed()]

    @property
    def last(self) -> int | None:
        """Step of the newest checkpoint. Waits for the last save."""
        return max(self.steps, default=None)

    @property
    def best(self) -> int | None:
        """Step of the checkpoint with the largest metric, the latest of equals. Waits for the last save."""
        scored = [(c.metrics[self._metric], c.step) for c in self._committed() if c.metrics]
        return max(scored)[1] if scored else None

    def save(self, state: TrainState, metrics: dict[str, Any] | None = None) -> None:
        """Starts to save `state` under its step; returns once it has been copied from the devices.

        `metrics` is given if the model was just evaluated.
        """
        self._pending = self._checkpointer.save_async(int(state.step), vars(state), metrics=metrics)

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """Loads the state of `step`.

        `abstract` has the shape, dtype and sharding of every array (`jax.ShapeDtypeStruct`); the sharding may differ
        from that of the saved one. Raises CheckpointError if the step is missing or has other arrays.
        """
        if step not in self.steps:
            raise CheckpointError(f"{self._directory} has no checkpoint of step {step}; it has {self.steps}.")
        metadata: Any = self._checkpointer.metadata(step)
        # Compared here, as orbax reports a misfit as an unknown format, and without naming the array.
        saved, wanted = _shapes(metadata.metadata), _shapes(vars(abstract))
        misfits = [
            f"{name} is {saved.get(name, 'absent')} there and {wanted.get(name, 'absent')} here"
            for name in sorted(saved.keys() | wanted.keys(), key=lambda name: (not name.startswith("params"), name))
            if saved.get(name) != wanted.get(name)
        ]
        if misfits:
            shown = "; ".join(misfits[:5]) + (f"; and {len(misfits) - 5} more" if len(misfits) > 5 else "")
            raise CheckpointError(
                f"checkpoint {self._directory / str(step)} does not fit this model in {len(misfits)} arrays: {shown}."
            )
        state: Any = self._checkpointer.load(step, vars(abstract))
        return TrainState(**state)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays in a tree by their names, `params.norm.scale`; orbax writes integer keys as strings."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}
