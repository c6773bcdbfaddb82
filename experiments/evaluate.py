r"""Scores a checkpoint on the test images, at the config's resolutions or at the one given.

    python -m experiments.evaluate --config=configs/s4nd/digits.py --checkpoint=runs/digits [--resolution=16]

`--checkpoint` is a run's workdir (its best checkpoint is taken) or one checkpoint, WORKDIR/checkpoints/STEP.
"""

import jax
from absl import flags
from etils import epath

from experiments import report
from experiments.command import config_flag, run_command
from experiments.config import Config, ConfigError, check_same_network
from experiments.experiment import Experiment, build
from experiments.problem import Scores
from ssm_jax.training.checkpoints import Checkpoints, find_checkpoint
from ssm_jax.training.steps import TrainState

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A run's workdir, or one of its checkpoints.", required=True)
_RESOLUTION = flags.DEFINE_integer("resolution", None, "Resolution of the test images; default: the config's.")


def evaluate(config: Config, checkpoint: epath.PathLike, resolution: int | None = None) -> Scores:
    """Prints the table of scores and returns them."""
    if resolution is not None and resolution < 1:
        raise ConfigError(f"--resolution must be at least 1, got {resolution}.")
    experiment = build(config)
    resolutions = [resolution] if resolution else sorted({experiment.resolution, *config.eval.resolutions})
    folder, step = find(checkpoint)
    check_same_network(folder.parent, config)
    with jax.set_mesh(experiment.mesh):
        state, step = restore(experiment, folder, step)
        scores = {r: experiment.evaluate(state, "test", r).scores for r in resolutions}
        checkpoint = f"checkpoint of step {step}"
        if jax.process_index() == 0:
            report.print_table(experiment, scores, checkpoint=checkpoint)
        report.scores_by_frames(experiment, state, scores, checkpoint=checkpoint)
    return scores


def restore(experiment: Experiment, folder: epath.Path, step: int | None) -> tuple[TrainState, int]:
    """The state of a step, or of the best one that is not damaged, and which it is."""
    abstract = experiment.abstract_state
    with Checkpoints(folder) as checkpoints:
        state = checkpoints.restore_best(abstract) if step is None else checkpoints.restore(abstract, step)
    return state, int(state.step)


def find(checkpoint: epath.PathLike) -> tuple[epath.Path, int | None]:
    """The folder of checkpoints that is meant, and the step if one is."""
    found = find_checkpoint(checkpoint)
    if found is None:
        raise ConfigError(f"--checkpoint={checkpoint} is neither a run's workdir nor a checkpoint in one.")
    return found


if __name__ == "__main__":
    run_command(lambda: evaluate(config_flag.value, CHECKPOINT.value, _RESOLUTION.value))
