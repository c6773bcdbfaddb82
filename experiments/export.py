r"""Writes the weights of a run as a file, for `config.weights`, `ssm_jax.pretrained.load_torch`, or PyTorch.

    python -m experiments.export --config=configs/s4nd/digits.py --checkpoint=runs/digits --out=digits.safetensors

`--checkpoint` is as for experiments.evaluate. Parameters are the averaged ones with `--ema`.
"""

import jax
from absl import flags
from etils import epath
from flax import nnx

from experiments.command import config_flag, run_command
from experiments.config import Config, ConfigError, check_same_network
from experiments.evaluate import CHECKPOINT, find, restore
from experiments.experiment import build
from ssm_jax.pretrained import save_safetensors


def export(config: Config, checkpoint: epath.PathLike, out: epath.PathLike, *, ema: bool = False) -> None:
    """Writes the best checkpoint of a run, or the one given, to the file `out`."""
    if ema and not config.ema_decay:
        raise ConfigError("--ema needs a run with averaged parameters, config.ema_decay > 0.")
    experiment = build(config)
    folder, step = find(checkpoint)
    check_same_network(folder.parent, config)
    with jax.set_mesh(experiment.mesh):
        state, step = restore(experiment, folder, step)
    model = nnx.merge(nnx.graphdef(experiment.abstract_model), state.ema if ema else state.params, state.rest)
    try:
        save_safetensors(model, out)
    except (FileExistsError, ValueError) as error:
        raise ConfigError(f"--out: {error}") from error
    print(f"{out} has the {'averaged ' if ema else ''}parameters of step {step}")


if __name__ == "__main__":
    _OUT = flags.DEFINE_string("out", None, "The file, FILE.safetensors.", required=True)
    _EMA = flags.DEFINE_bool("ema", False, "Write the averaged parameters.")
    run_command(lambda: export(config_flag.value, CHECKPOINT.value, _OUT.value, ema=_EMA.value))
