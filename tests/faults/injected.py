"""`python -m experiments.train` with a fault in the batch of one step, of process 1 if there are several."""

import errno
import os

import jax
import numpy as np
from absl import flags

from experiments.command import config_flag, run_command
from experiments.experiment import Experiment
from experiments.train import train, workdir_flag

_AT = flags.DEFINE_integer("at", None, "Step whose batch it is.", required=True)


def with_nan(batch):
    """One number of one image is NaN."""
    image = batch["image"].astype(np.float32)
    image.flat[image.size // 2] = np.nan
    return batch | {"image": image}


def unreadable(batch):
    """As from a disk that fails."""
    raise OSError(errno.EIO, os.strerror(errno.EIO))


_FAULT = flags.DEFINE_enum("fault", None, ["with_nan", "unreadable"], "Which one.")


def main():
    """Trains as experiments.train does."""
    read = Experiment.train_batches
    fault = {"with_nan": with_nan, "unreadable": unreadable}[_FAULT.value]

    def train_batches(experiment, start=0):
        for step, batch in enumerate(read(experiment, start), start + 1):
            hit = step == _AT.value and jax.process_index() == jax.process_count() - 1
            yield fault(batch) if hit else batch

    Experiment.train_batches = train_batches
    train(config_flag.value, workdir_flag.value)


if __name__ == "__main__":
    run_command(main)
