r"""A bottleneck ResNet and a small DeiT, plain and with each method that aggregates layers, on two small datasets.

    python -m experiments.compare --config=configs/aggregation/comparison.py --workdir=runs/comparison \
        --config.data_dir=FOLDER

FOLDER has both datasets as TensorFlow Datasets prepares them, `cifar10/` and `tiny_imagenet20/`. What comes after a
colon, with commas between, are the comparisons to make, DATASET_FAMILY (all by default), and `quick`. The ResNet has 56
layers and is trained as usual for small images: SGD 0.1, batch 128, 180 epochs, a tenth of the rate after 100 and 150;
DeiT-Ti as long, by AdamW. `quick` is about an hour on three CPU cores: smaller networks, images of half the resolution,
700 steps. That is, each in a process of its own with --shard=1/3, 2/3 and 3/3, and then with --summarize:

    python -m experiments.compare --config=configs/aggregation/comparison.py:quick --workdir=runs/quick --shard=1/3
    python -m experiments.compare --config=configs/aggregation/comparison.py:quick,cifar10_deit --workdir=runs/deit
"""

from ml_collections import ConfigDict, config_dict

from configs.common import classification

METHODS = {
    "resnet": ("plain", "se", "eca", "rla", "mrla_light", "s6la"),
    "deit": ("plain", "se", "eca", "mrla_light", "s6la"),
}
NOTES = {
    "resnet": "SE and ECA are at the end of a block's branch.",
    "deit": "SE and ECA are on the output of the MLP's branch, over all tokens. RLA is defined for ResNets only.",
}
DATASETS = {"cifar10": 32, "tiny_imagenet20": 64}
COMPARISONS = [f"{dataset}_{family}" for dataset in DATASETS for family in METHODS]


def get_config(argument: str = "") -> ConfigDict:
    words = argument.split(",") if argument else []
    if unknown := set(words) - {"quick", *COMPARISONS}:
        raise ValueError(
            "--config=configs/aggregation/comparison.py:WORDS takes quick and any of "
            f"{', '.join(COMPARISONS)}, got {', '.join(sorted(unknown))!r}."
        )
    config = ConfigDict({"seeds": (0, 1, 2), "data_dir": config_dict.FieldReference(""), "comparisons": {}})
    for dataset, size in DATASETS.items():
        for family, run in [("resnet", resnet(size, "quick" in words)), ("deit", deit(size, "quick" in words))]:
            name = f"{dataset}_{family}"
            if name in words or not set(words) - {"quick"}:
                run.data.update(name=dataset, dir=config.get_ref("data_dir"))
                config.comparisons[name] = {"methods": METHODS[family], "note": NOTES[family], "run": run}
    return config


def resnet(size: int, quick: bool) -> ConfigDict:
    """With maxima of 3 x 3 windows after the stem where images are larger than CIFAR's."""
    config = _common(size, quick)
    config.model = {"name": "resnet_cifar", "depth": 20 if quick else 56, "max_pool": size > 32}
    config.optimizer.update(name="sgd", lr=0.1, ssm_lr=0.1, weight_decay=1e-4)
    if quick:
        config.optimizer.warmup_epochs = 0.1 * config.epochs
    else:
        config.optimizer.decay_epochs = (100, 150)
    return config


def deit(size: int, quick: bool) -> ConfigDict:
    """8 x 8 patches, or 4 x 4 in the `quick` comparison."""
    config = _common(size, quick)
    patches = {"img_size": size // 2 if quick else size, "patch_size": size // 8}
    width = {"d_model": 96, "depth": 6} if quick else {"d_model": 192, "depth": 12}
    config.model = {"name": "deit_tiny", **patches, **width}
    config.optimizer.update(lr=1e-3 if quick else 5e-4, weight_decay=0.05, warmup_epochs=0.05 * config.epochs)
    config.optimizer.ssm_lr = config.optimizer.lr
    if not quick:
        config.model.drop_path = 0.1
        config.label_smoothing = 0.1
    return config


def _common(size: int, quick: bool) -> ConfigDict:
    config = classification.get_config()
    config.augment.update(crop_padding=4, flip=True)
    config.batch_size, config.epochs = 128, 180.0
    config.eval.update(every_epochs=5.0, batch_size=500)
    config.checkpoint_every_epochs = 1.0
    if quick:
        config.data.resolution = size // 2
        config.batch_size, config.epochs = 64, {32: 1.0, 64: 5.0}[size]
        config.eval.every_epochs = config.epochs
        config.checkpoint_every_epochs = config.epochs / 5
    return config
