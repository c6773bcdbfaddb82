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
            # The training loop decides when to save.
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=_policies.AnyPreservationPolicy([_policies.LatestN(_KEEP_LAST), best]),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._checkpointer.close()

    @property
    def steps(self) -> list[int]:
        """Steps of all checkpoints, in order."""
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    @property
    def last(self) -> int | None:
        """Step of the newest checkpoint."""
        return max(self.steps, default=None)

    @property
    def best(self) -> int | None:
        """Step of the checkpoint with the largest metric, the latest of equals."""
        scored = [(c.metrics[self._metric], c.step) for c in self._checkpointer.checkpoints if c.metrics]
        return max(scored)[1] if scored else None

    def save(self, state: TrainState, data_position: dict[str, Any], metrics: dict[str, float] | None = None) -> None:
        """Starts to save `state` under its step; returns once it has been copied from the devices.

        `data_position` is the (JSON) state of the data iterator; `metrics` is given if the model was just evaluated.
        """
        step = int(state.step)
        self._checkpointer.save_async(step, vars(state), metrics=metrics, custom_metadata={"data": data_position})

    def restore(self, abstract: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """Loads the state of `step` and its position in the data.

        `abstract` has the shape, dtype and sharding of every array (`jax.ShapeDtypeStruct`), of which the sharding
        may differ from what was saved. Raises CheckpointError if the step is missing or has other arrays.
        """
        if step not in self.steps:
            raise CheckpointError(f"{self._directory} has no checkpoint of step {step}; it has {self.steps}.")
        try:
            state = self._checkpointer.load(step, vars(abstract))
        except Exception as error:
            # Orbax reports every failure as an unknown format; what went wrong is in the cause.
            raise CheckpointError(
                f"checkpoint {self._directory / str(step)} does not fit this model: {error.__cause__ or error}"
            ) from error
        metadata = self._checkpointer.metadata(step).custom_metadata
        return TrainState(**state), metadata["data"]


def abstract_with_shardings(abstract: Any, shardings: Any) -> Any:
    """What `Checkpoints.restore` takes, from shapes (`jax.eval_shape`) and shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
    )
