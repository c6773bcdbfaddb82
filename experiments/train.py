r"""Trains and evaluates a network as a config says; started again with the same command, a run goes on.

    python -m experiments.train --config=configs/s4nd/digits.py --workdir=runs/digits [--config.FIELD=VALUE ...]

The workdir gets config.json, run.json, metrics.jsonl, TensorBoard event files, checkpoints/, results.json, pictures/
and report.html, which has all of it on one page. `--profile` and `--writer`: see experiments/observe.py.
"""

import functools
import math
from collections.abc import Sequence

import jax
from absl import flags
from etils import epath
from jax.experimental import multihost_utils

from experiments import report
from experiments.command import config_flag, run_command
from experiments.config import Config, check_alike, check_workdir, claim_workdir
from experiments.experiment import Experiment, Interrupted, build
from experiments.lock import locked
from experiments.observe import MakeWriter, Steps, check_profile, find_writer, parse_profile
from experiments.problem import Scores
from experiments.processes import Stopping, training
from experiments.record import recorded
from ssm_jax.training.checkpoints import Checkpoints, absolute
from ssm_jax.training.loop import Stopped, fit
from ssm_jax.training.metrics import MetricWriter, ProgressBar, Throughput
from ssm_jax.training.profiling import Trace
from ssm_jax.training.sharding import sharding_table
from ssm_jax.training.steps import TrainState

workdir_flag = flags.DEFINE_string("workdir", None, "Directory of the run; a run that is there is gone on with.")


def train(
    config: Config, workdir: epath.PathLike, *, profile: Steps | None = None, writers: Sequence[MakeWriter] = ()
) -> Scores:
    """Trains from the workdir's last checkpoint, if any, and scores the best checkpoint on the test images.

    `profile` and `writers` are of this start, see `experiments.observe`.
    """
    workdir = absolute(workdir)
    experiment = build(config)
    check_alike(config, workdir)
    check_workdir(workdir, config)
    with (
        locked(workdir),
        jax.set_mesh(experiment.mesh),
        Checkpoints(workdir / "checkpoints", metric=experiment.best_by) as checkpoints,
    ):
        restored = checkpoints.restore_last(experiment.abstract_state)
        state = experiment.init() if restored is None else restored
        traced = None if profile is None else check_profile(profile, int(state.step), experiment.total_steps)
        claim_workdir(workdir, config)  # from here on mistakes of the user are no reason any more to end
        multihost_utils.sync_global_devices("workdir claimed")
        with recorded(experiment, workdir):
            with training() as stopping:
                _fit(experiment, state, workdir, checkpoints, stopping, traced, writers)
                state = checkpoints.restore_best(experiment.abstract_state)  # every run ends with an evaluation
            return report.write(experiment, state, workdir)


def _fit(
    experiment: Experiment,
    state: TrainState,
    workdir: epath.Path,
    checkpoints: Checkpoints,
    stopping: Stopping,
    traced: Steps | None,
    writers: Sequence[MakeWriter],
) -> None:
    config = experiment.config
    start = int(state.step)
    batches = map(experiment.put, experiment.train_batches(start))

    def evaluate(state: TrainState) -> dict[str, float] | None:
        try:
            scores = experiment.evaluate(state, "val", experiment.resolution, stopping=stopping).scores
        except Interrupted:
            return None
        writer.write(int(state.step), experiment.ssm_statistics(state))
        return {f"val/{name}": value for name, value in scores.items()}

    def steps(epochs: float) -> int:
        return max(1, round(epochs * experiment.steps_per_epoch))

    others = [functools.partial(make, workdir, config.to_dict(), start) for make in writers]
    with (
        MetricWriter(workdir, step=start, others=others) as writer,
        ProgressBar(total_steps=experiment.total_steps, step=start) as progress,
        Trace(workdir / "profile", *(traced or (0, 0))) as trace,
    ):
        parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
        sizes = ", then ".join(experiment.problem.size(stage.resolution) for stage in experiment.stages)
        progress.print(
            f"{config.model.name} with {parameters:,} parameters on {config.data.name} at {sizes}, "
            f"{experiment.total_steps:,} steps of {config.batch_size} images on "
            f"{experiment.mesh.size} x {jax.devices()[0].device_kind}"
            + (f", going on from step {start:,}" if start else "")
        )
        if experiment.mesh.size > 1:
            progress.print(sharding_table(experiment.abstract_state))
        eval_every = steps(config.eval.every_epochs)
        evaluated = start == 0 or checkpoints.scored(start)
        if not evaluated and (start % eval_every == 0 or start in [stage.end for stage in experiment.stages]):
            scores = evaluate(state)  # which a signal has interrupted
            if scores is None:
                raise Stopped(start)
            writer.write(start, scores)
            writer.flush()
            checkpoints.add_metrics(start, scores)
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
                    eval_every=eval_every,
                    checkpoint_every=steps(config.checkpoint_every_epochs),
                    log_every=config.log_every_steps,
                    stopping=stopping,
                    tracing=trace,
                    throughput=Throughput(devices=experiment.mesh.size, ideal_seconds=experiment.ideal_seconds(stage)),
                )


if __name__ == "__main__":
    _PROFILE = flags.DEFINE_string("profile", None, "Steps of this start to trace, such as 10:15, or how many.")
    _WRITER = flags.DEFINE_multi_string("writer", [], "MODULE:FUNCTION that makes a further writer of metrics.")

    def main() -> None:
        """Runs the command."""
        profile = None if _PROFILE.value is None else parse_profile(_PROFILE.value)
        writers = [find_writer(name) for name in _WRITER.value]
        assert workdir_flag.value is not None
        train(config_flag.value, workdir_flag.value, profile=profile, writers=writers)

    flags.mark_flag_as_required("workdir")
    run_command(main)
