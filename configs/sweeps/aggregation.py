r"""A bottleneck ResNet and a small DeiT, plain and with each method that aggregates layers, on two small datasets.

    python -m experiments.sweep --config=configs/sweeps/aggregation.py --config.data_dir=FOLDER

FOLDER has both datasets as TensorFlow Datasets prepares them, `cifar10/` and `tiny_imagenet20/`. What comes after a
colon, with commas between, are the tables to make, DATASET_FAMILY (all by default), and `quick`. The ResNet has 56
layers and is trained as usual for small images: SGD 0.1, batch 128, 180 epochs, a tenth of the rate after 100 and 150;
DeiT-Ti as long, by AdamW. `quick` is an hour and a half on four CPU cores: smaller networks, images of half the
resolution, 700 steps. That is, each in a process of its own with --shard=1/4 to 4/4, and then with --summarize:

    python -m experiments.sweep --config=configs/sweeps/aggregation.py:quick --shard=1/4 --config.data_dir=FOLDER
    python -m experiments.sweep --config=configs/sweeps/aggregation.py:quick,cifar10_deit --config.data_dir=FOLDER
"""

from ml_collections import ConfigDict

from configs.common import classification, sweeps

METHODS = {
    "resnet": ("plain", "se", "eca", "rla", "mrla_light", "s6la"),
    "deit": ("plain", "se", "eca", "mrla_light", "s6la"),
}
LABELS = {"plain": "plain", "se": "SE", "eca": "ECA", "rla": "RLA", "mrla_light": "MRLA-light", "s6la": "S6LA"}
TITLES = {"resnet": "ResNet", "deit": "DeiT"}
NOTES = {
    "resnet": "SE and ECA are at the end of a block's branch.",
    "deit": "SE and ECA are on the output of the MLP's branch, over all tokens. RLA is defined for ResNets only.",
}
DATASETS = {"cifar10": ("CIFAR-10", 32), "tiny_imagenet20": ("tiny_imagenet20", 64)}
TABLES = [f"{dataset}_{family}" for dataset in DATASETS for family in METHODS]


def get_config(argument: str = "") -> ConfigDict:
    words = argument.split(",") if argument else []
    if unknown := set(words) - {"quick", *TABLES}:
        raise ValueError(
            f"--config=configs/sweeps/aggregation.py:WORDS takes quick and any of {', '.join(TABLES)}, got "
            f"{', '.join(sorted(unknown))!r}."
        )
    chosen = set(words) - {"quick"} or set(TABLES)
    tables = {}
    for dataset in DATASETS:
        for family in METHODS:
            if (name := f"{dataset}_{family}") in chosen:
                tables[name] = table(dataset, family, "quick" in words)
    return sweeps.sweep("s6la", tables)


def table(dataset: str, family: str, quick: bool) -> ConfigDict:
    """A network, and the same with each method."""
    title, size = DATASETS[dataset]
    rows = {}
    for method in METHODS[family]:
        run = {"resnet": resnet, "deit": deit}[family](size, quick)
        run.data.name = dataset
        if method != "plain":
            run.model.name += f"_{method}"
        rows[method] = sweeps.row(LABELS[method], run)
    network = ", ".join(f"{name}={value}" for name, value in run.model.to_dict().items() if name != "name")
    plain = rows["plain"].run.model.name
    return sweeps.table(
        f"Layer aggregation: {TITLES[family]} on {title}", f"{plain} with {network}. {NOTES[family]}", rows
    )


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
