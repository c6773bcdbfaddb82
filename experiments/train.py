r"""Trains and evaluates a network as a config says; started again with the same command, a run goes on.

    python -m experiments.train --config=configs/s4nd/digits.py --workdir=runs/digits [--config.FIELD=VALUE ...]

The workdir gets config.json, metrics.jsonl, TensorBoard event files, checkpoints/, results.json and pictures/.
"""

import math

import jax
from absl import flags
from etils import epath
from jax.experimental import multihost_utils

from experiments import report
from experiments.command import config_flag, run_command, until_interrupted
from experiments.config import Config, claim_workdir
from experiments.experiment import Experiment, build
from ssm_jax.training.checkpoints import Checkpoints
from ssm_jax.training.loop import fit
from ssm_jax.training.metrics import MetricWriter, ProgressBar
from ssm_jax.training.steps import TrainState

workdir_flag = flags.DEFINE_string(
    "workdir", None, "Directory of the run; a run that is there is gone on with.", required=True
)


def train(config: Config, workdir: epath.PathLike) -> report.Scores:
    """Trains from the workdir's last checkpoint, if any, and scores the best checkpoint on the test images."""
    workdir = epath.Path(workdir).resolve()  # orbax wants an absolute path
    experiment = build(config)
    claim_workdir(workdir, config)
    multihost_utils.sync_global_devices("workdir claimed")
    with (
        jax.set_mesh(experiment.mesh),
        Checkpoints(workdir / "checkpoints", metric="val/accuracy") as checkpoints,
    ):
        _fit(experiment, workdir, checkpoints)
        best = checkpoints.best
        assert best is not None, "every run ends with an evaluation"
        state = checkpoints.restore(experiment.abstract_state, best)
        return report.write(experiment, state, workdir)


def _fit(experiment: Experiment, workdir: epath.Path, checkpoints: Checkpoints) -> None:
    config = experiment.config
    last = checkpoints.last
    state = experiment.init() if last is None else checkpoints.restore(experiment.abstract_state, last)
    start = last or 0
    batches = map(experiment.put, until_interrupted(experiment.train_batches(start)))

    def evaluate(state: TrainState) -> dict[str, float]:
        scores = experiment.evaluate(state, "val", experiment.resolution).scores
        return {f"val/{name}": value for name, value in scores.items()}

    def steps(epochs: float) -> int:
        return max(1, round(epochs * experiment.steps_per_epoch))

    with (
        MetricWriter(workdir, step=start) as writer,
        ProgressBar(total_steps=experiment.total_steps, step=start) as progress,
    ):
        parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
        sizes = ", then ".join(f"{stage.resolution} x {stage.resolution}" for stage in experiment.stages)
        progress.print(
            f"{config.model.name} with {parameters:,} parameters on {config.data.name} at {sizes}, "
            f"{experiment.total_steps:,} steps of {config.batch_size} images on "
            f"{experiment.mesh.size} x {jax.devices()[0].device_kind}"
            + (f", going on from step {start:,}" if start else "")
        )
        for stage in experiment.stages:
            if start < stage.end:
                state = fit(
                    state,
                    train_step=experiment.train_step(stage),
                    batches=batches,
                    evaluate=evaluate,
                    schedule=experiment.schedule,
                    checkpoints=checkpoints,
                    writer=writer,
                    progress=progress,
                    batch_size=config.batch_size,
                    total_steps=stage.end,
                    eval_every=steps(config.eval.every_epochs),
                    checkpoint_every=steps(config.checkpoint_every_epochs),
                    log_every=config.log_every_steps,
                )


if __name__ == "__main__":
    run_command(lambda: train(config_flag.value, workdir_flag.value))
