r"""S4ND-ISO on scikit-learn's 8 x 8 digits: a small network for a laptop CPU, also the project's self-test.

python -m experiments.train --config=configs/s4nd/digits.py --workdir=runs/digits
"""

from ml_collections import ConfigDict

from configs.common import classification


def get_config() -> ConfigDict:
    config = classification.get_config()
    config.model = {
        "name": "isotropic_s4nd",
        "d_model": 64,
        "n_layers": 4,
        "dropout": 0.1,
        "mixer": {"d_state": 32, "init": "diag-lin", "dt_min": 0.1, "dt_max": 1.0, "bandlimit": 0.5},
    }
    config.data.name = "digits"
    config.augment.crop_padding = 1
    config.batch_size = 64
    config.epochs = 60.0
    config.optimizer.update(lr=1e-2, ssm_lr=1e-3, weight_decay=0.05, warmup_epochs=3.0)
    config.eval.update(every_epochs=10.0, batch_size=180, resolutions=(4, 8, 16))
    config.checkpoint_every_epochs = 10.0
    config.log_every_steps = 19
    return config
