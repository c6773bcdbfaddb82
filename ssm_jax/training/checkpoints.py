"""Checkpoints of a run: asynchronous and atomic, the best one and the last ones kept."""

from typing import Any

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

    def save(self, state: TrainState, data_position: dict[str, Any], metrics: dict[str, Any] | None = None) -> None:
        """Starts to save `state` under its step; returns once it has been copied from the devices.

        `data_position` is the (JSON) state of the data iterator; `metrics` is given if the model was just evaluated.
        """
        position: Any = {"data": data_position}
        self._pending = self._checkpointer.save_async(
            int(state.step), vars(state), metrics=metrics, custom_metadata=position
        )

    def restore(self, abstract: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        """Loads the state of `step` and its position in the data.

        `abstract` has the shape, dtype and sharding of every array (`jax.ShapeDtypeStruct`); the sharding may differ
        from that of the saved one. Raises CheckpointError if the step is missing or has other arrays.
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
        metadata: Any = self._checkpointer.metadata(step).custom_metadata
        return TrainState(**state), metadata["data"]
