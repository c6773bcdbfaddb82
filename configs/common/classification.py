"""Every field of a run that trains and evaluates a classifier, with its default; configs fill in what a recipe changes.

Images and videos, one class or several attributes each: what there is to learn is the dataset's.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "seed": 0,  # of parameters, data order, augmentation and dropout
            "dtype": "float32",  # of matrix products: float32 or bfloat16; state spaces and FFTs stay float32
            "model": {"name": ""},  # of ssm_jax.list_models(), with arguments of its constructor
            # What to start from: a file of a network's parameters, a run's workdir (its best checkpoint), or one of its
            # checkpoints, WORKDIR/checkpoints/STEP. Of a run these are the parameters themselves; their average is what
            # experiments.export writes with --ema. A network over images is inflated for video.
            "weights": "",
            "data": {
                "name": "",  # of the datasets in docs/data.md
                "dir": "",  # of the dataset; "": ~/tensorflow_datasets, ~/imagenet, ~/coco or ~/hmdb51
                "image_size": config_dict.placeholder(int),  # base resolution; None: the dataset's own
                "resolution": config_dict.placeholder(int),  # of training images; None: the base resolution
                "fold": 1,  # of hmdb51, as are the next two
                "frames": 30,  # of a clip
                "seconds": 2.0,  # that a clip lasts
                "bad_annotations": "skip",  # of coco: leave them out, and say how many; or "refuse" the dataset
                "sides": (800, 1333),  # of a detector's images: the shorter one, if the longer is at most the second
                "max_objects": 100,  # of an image that a detector is trained on
                "workers": 0,  # processes that read the data; 0: threads of the one that trains
                "max_broken": 0.01,  # share of the examples that may be unreadable; others take their places
            },
            "augment": {  # in this order; what is not a training image's is in `eval`
                "crop_padding": 0,  # pixels of reflection on each side of an image, then a crop of its size
                "crop_scale": (),  # least and greatest share of an image in a crop resized to the base resolution
                "interpolation": "bicubic",  # of that crop: bilinear, bicubic or random
                "short_side": (256, 320),  # of a video before a crop of the base resolution
                "flip": False,
                "rand_augment": "",  # as timm writes it: rand-m9-mstd0.5-inc1
                "color_jitter": 0.0,
                "repeats": 1,  # times that an epoch has an image, each augmented anew
                "erasing": 0.0,  # probability of a box of noise
                "mixup": 0.0,  # alpha; 0: none
                "cutmix": 0.0,  # alpha
                "mix_switch": 0.5,  # probability of cutmix where there are both
                "mix_probability": 1.0,
                "mix_group": 128,  # rows that are mixed with each other, in the same way: a GPU's, in PyTorch
            },
            "batch_size": 64,  # rows of an update, over all devices
            "accumulate": 1,  # parts in which these go through the model
            "epochs": 1.0,
            "stages": {  # of progressive resizing, each with a warm-up and a cosine of its own; (): one stage
                "epochs": (),  # which add up to `epochs`
                "resolutions": (),
                "bandlimits": (),  # of model.mixer; 0: none
            },
            "optimizer": {
                "name": "adamw",  # lamb or sgd
                "lr": 1e-3,
                "ssm_lr": 1e-3,  # for dt, A, B and P of state spaces
                "ssm_c_lr": config_dict.placeholder(float),  # for C; None: lr
                "weight_decay": 0.0,
                "frozen": (),  # names of parameters, or modules, that stay as they are: ("backbone.network.stages.0",)
                "decay_rule": "weights",  # what decays: weights, matrices (timm's rule) or all
                "warmup_epochs": 0.0,
                "warmup_lr": 0.0,  # at the first step
                "warmup_prefix": True,  # the cosine begins after the warm-up; False: in it, as timm has it
                "cosine_epochs": config_dict.placeholder(float),  # where the cosine ends; None: with the training
                "end_lr": 0.0,  # there and after it
                "decay_epochs": (),  # instead of a cosine: each leaves a tenth of the rate
                "per_epoch": False,  # the rate changes between epochs only
                "clip_norm": config_dict.placeholder(float),
                "momentum": 0.9,  # of sgd; the rest is of adamw and lamb
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
            },
            "label_smoothing": 0.0,
            "double_label_smoothing": False,  # once in the mixing and once in the loss, as S4ND's release
            "ema_decay": 0.0,  # of an average of the parameters, evaluated beside them; 0: none
            "ema_warmup": False,
            "mesh": {"data": -1, "fsdp": 1},  # devices that share the batch; "fsdp" ones also share large parameters
            "sharding_rules": (),  # (("head.kernel", 1),): parameters by name, and which axis fsdp divides, None: none
            "eval": {
                "every_epochs": 1.0,
                "batch_size": 256,  # rounded up to a multiple of the devices
                "crop_pct": 1.0,  # side of the crop in the middle / shorter side of the resized image
                "interpolation": "bicubic",
                "short_side": 256,  # of a video
                "resolutions": (),  # of the test images in the final table, besides that of training
                "frames": (),  # of the test clips in further tables, in the same time: other frame rates
            },
            "checkpoint_every_epochs": 1.0,  # besides after every evaluation
            "log_every_steps": 50,
            "published": {  # what others report for this recipe, for `python -m experiments.configs`
                "value": config_dict.placeholder(float),
                "metric": "",
                "source": "",
            },
            "smoke": False,  # cut to two steps of each stage of a small network of the kind, without `weights`
        }
    )
