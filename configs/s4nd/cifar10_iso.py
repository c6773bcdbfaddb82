r"""S4ND-ISO on CIFAR-10 at 32 x 32: the paper's recipe (AdamW 0.01, weight decay 0.05, batch 50, 100 epochs).

The network is the paper's 8 x 512 with diagonal (S4D) kernels. Not yet run to its end by this project; the accuracy to
expect is therefore not stated here.

    python -m experiments.train --config=configs/s4nd/cifar10_iso.py --workdir=runs/cifar10 \
        --config.data.dir=$HOME/tensorflow_datasets
"""

from ml_collections import ConfigDict, config_dict

from configs.common import classification


def get_config() -> ConfigDict:
    config = classification.get_config()
    config.seed = 2222
    config.model = {
        "name": "isotropic_s4nd",
        "d_model": 512,
        "n_layers": 8,
        "dropout": 0.1,
        "mixer": {
            "d_state": 64,
            "init": "legs",
            "dt_min": 0.1,
            "dt_max": 1.0,
            "bandlimit": config_dict.placeholder(float),
        },
    }
    config.data.update(name="cifar10", crop_padding=4, flip=True)
    config.batch_size = 50
    config.epochs = 100.0
    config.optimizer.update(lr=1e-2, ssm_lr=1e-3, weight_decay=0.05, warmup_epochs=1.0)
    config.eval.update(every_epochs=1.0, batch_size=200, resolutions=(8, 16, 32))
    config.log_every_steps = 100
    return config
