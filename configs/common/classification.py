"""Every field of an image classification run, with its default; the configs fill in what a recipe changes."""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "seed": 0,  # of parameters, data order, augmentation and dropout
            "dtype": "float32",  # of matrix products: float32 or bfloat16; state spaces and FFTs stay float32
            "model": {"name": ""},  # of ssm_jax.list_models(), with arguments of its constructor
            "data": {
                "name": "",  # cifar10, digits, image_folder or tiny_imagenet20
                "dir": "",  # of the dataset; "": ~/tensorflow_datasets, or ~/imagenet for an image folder
                "image_size": config_dict.placeholder(int),  # base resolution of an image folder
                "resolution": config_dict.placeholder(int),  # of training images; None: the dataset's own
                "crop_padding": 0,
                "flip": False,
            },
            "batch_size": 64,  # rows of an update, over all devices
            "accumulate": 1,  # parts in which these go through the model
            "epochs": 1.0,
            "optimizer": {
                "name": "adamw",  # or sgd
                "lr": 1e-3,
                "ssm_lr": 1e-3,  # for dt, A, B and P of state spaces
                "weight_decay": 0.0,
                "warmup_epochs": 0.0,
                "end_lr": 0.0,
                "decay_epochs": (),  # each leaves a tenth of the rate; (): half a cosine
                "clip_norm": config_dict.placeholder(float),
                "momentum": 0.9,  # of sgd; the rest is of adamw
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
            },
            "label_smoothing": 0.0,
            "ema_decay": 0.0,  # 0: no averaging
            "mesh": {"data": -1, "fsdp": 1},  # devices that share the batch; "fsdp" ones also share the parameters
            "eval": {
                "every_epochs": 1.0,
                "batch_size": 256,  # rounded up to a multiple of the devices
                "resolutions": (),  # of the test images in the final table, besides that of training
            },
            "checkpoint_every_epochs": 1.0,  # besides after every evaluation
            "log_every_steps": 50,
        }
    )
