r"""Writes a run's network for use elsewhere: as a function for JAX alone, or its weights for PyTorch and ssm_jax.

    python -m experiments.export --config=configs/s4nd/digits.py --checkpoint=runs/digits --out=digits [--resolution=16]
    python -m experiments.export --config=configs/s4nd/digits.py --checkpoint=runs/digits --out=digits.safetensors

The first makes a folder, with a README.md that says how it is used; see docs/export.md. The second is what
`config.weights` and `ssm_jax.pretrained.load_torch` take. `--checkpoint` is as for experiments.evaluate. Parameters are
the averaged ones with `--ema`.
"""

import contextlib
import json
import math
import os
import string
from collections.abc import Iterator
from typing import Any

import flax
import jax
import numpy as np
import safetensors.numpy
from absl import flags
from etils import epath
from flax import nnx

import ssm_jax
from experiments.command import config_flag, run_command
from experiments.config import Config, ConfigError, check_same_network, flatten
from experiments.evaluate import CHECKPOINT, find, restore
from experiments.experiment import Experiment, build
from experiments.problem import is_detector
from ssm_jax.data.resolution import normalize
from ssm_jax.export import PLATFORMS, export_function, weights
from ssm_jax.pretrained import save_safetensors

_README = string.Template("""\
# $title

`model.jax_export` is a function of weights and images.

* images: $images, any number of them. In the run they were $preparation.
  Normalization is a part of the function.
* result: logits of $classes classes, of which $of makes probabilities.
* `metadata.json` has all of this, with the names of the classes, scores, and the config.

With `pip install jax flatbuffers safetensors`, in this folder:

```python
import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file

function = jax.export.deserialize(Path("model.jax_export").read_bytes())
weights = jax.device_put(load_file("weights.safetensors"))
names = json.loads(Path("metadata.json").read_text())["class_names"]
network = jax.jit(function.call)  # compiled once for each number of images

images = np.zeros($example, np.uint8)
logits = np.asarray(network(weights, images))
for row in logits:
    print($one)
```

It runs on $platforms. JAX $jax wrote it; it can be read by that and by releases of the six months after it, at least.
""")


def export(
    config: Config,
    checkpoint: epath.PathLike,
    out: epath.PathLike,
    *,
    ema: bool = False,
    resolution: int | None = None,
) -> None:
    """Writes the best checkpoint of a run, or the one given, to the file or folder `out`.

    `resolution` is that of the images that the function takes, by default that of the run's validation. `out` is there
    as a whole, with the folders that it is in, or not at all.
    """
    path, as_file = _checked(out)
    if jax.process_count() > 1:
        raise ConfigError("export runs in one process; on a host of several, with JAX_PLATFORMS=cpu.")
    if ema and not config.ema_decay:
        raise ConfigError("--ema needs a run with averaged parameters, config.ema_decay > 0.")
    if resolution is not None and (as_file or resolution < 1):
        raise ConfigError(f"--resolution must be at least 1, and --out a folder, got {resolution} and {out}.")
    if is_detector(config) and not as_file:
        raise ConfigError(f"--out must be FILE.safetensors for a detector: weights alone are written. Got {out}.")
    folder, step = find(checkpoint)
    check_same_network(folder.parent, config)
    experiment = build(config)
    resolution = resolution or experiment.resolution
    function = None if as_file else _function(experiment, resolution)  # what is wrong shows before anything is read
    with jax.set_mesh(experiment.mesh):
        state, step = restore(experiment, folder, step)
    model = nnx.merge(nnx.graphdef(experiment.abstract_model), state.ema if ema else state.params, state.rest)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if function is None:
            save_safetensors(model, path)
        else:
            metadata = _metadata(experiment, resolution) | {
                "step": step,
                "averaged": ema,
                "scores": _scores(folder.parent, step, ema=ema),
                "versions": {"ssm_jax": ssm_jax.__version__, "jax": jax.__version__, "flax": flax.__version__},
            }
            with _whole(path) as unfinished:
                (unfinished / "model.jax_export").write_bytes(bytes(function.serialize()))
                (unfinished / "weights.safetensors").write_bytes(safetensors.numpy.save(weights(model)))
                (unfinished / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
                (unfinished / "README.md").write_text(_readme(metadata))
    except OSError as error:
        raise ConfigError(f"--out={out}: {error}") from error
    what = "parameters" if function is None else "network, with the parameters"
    print(f"{path} has the {what}{', averaged,' if ema else ''} of step {step}")


def _checked(out: epath.PathLike) -> tuple[epath.Path, bool]:
    """Where to write, and whether that is a file. Raises ConfigError for a name that is taken, or says neither."""
    out = os.fspath(out)
    path = epath.Path(out).expanduser().resolve()
    as_file = path.suffix == ".safetensors" and not out.endswith("/")
    if not out or not (as_file or not path.suffix or out.endswith("/")):
        raise ConfigError(
            f"--out must be FILE.safetensors, for weights alone, or a folder (one with a dot in its name as NAME/), "
            f"got {out!r}."
        )
    above = next(folder for folder in path.parents if folder.exists())
    if not above.is_dir():
        raise ConfigError(f"--out: {above} is a file, so that there can be no {path}.")
    if path.exists() and (as_file or not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"--out: {path} exists{'' if as_file else ' and is no empty folder'}; choose another name.")
    return path, as_file


def _function(experiment: Experiment, resolution: int) -> jax.export.Exported:
    """The network as a function of weights and bytes."""
    dataset = experiment.dataset
    try:
        return export_function(
            experiment.abstract_model,
            _shape(experiment, resolution),
            dtype=np.uint8,
            prepare=lambda images: normalize(images, dataset.mean, dataset.std),
            rate=dataset.resolution / resolution,
        )
    except ValueError as error:
        raise ConfigError(f"--resolution={resolution}: {error}") from error


def _shape(experiment: Experiment, resolution: int) -> tuple[int, ...]:
    dataset = experiment.dataset
    frames = () if dataset.frames is None else (dataset.frames,)
    return (*frames, resolution, resolution, dataset.channels)


def _metadata(experiment: Experiment, resolution: int) -> dict[str, Any]:
    """What whoever uses the function has to know of it."""
    config, dataset = experiment.config, experiment.dataset
    return {
        "network": config.model.name,
        "dataset": dataset.title,
        "images": {
            "shape": ["batch", *_shape(experiment, resolution)],
            "dtype": "uint8",
            "channels": "gray" if dataset.channels == 1 else "RGB",
            "preparation": _preparation(experiment, resolution),
            "normalized_inside": {"mean": dataset.mean, "std": dataset.std},
        },
        "logits": {
            "shape": ["batch", dataset.num_classes],
            "dtype": "float32",
            "of": "sigmoid" if dataset.multi_label else "softmax",
        },
        "class_names": dataset.class_names,
        "rate": dataset.resolution / resolution,
        "platforms": list(PLATFORMS),
        # Of this machine are its paths.
        "config": {field: value for field, value in flatten(config).items() if field not in ("data.dir", "weights")},
    }


def _preparation(experiment: Experiment, resolution: int) -> str:
    """What the run's evaluation makes of files."""
    dataset, config = experiment.dataset, experiment.config
    if dataset.frames is None:
        each, side, filter = "", math.floor(dataset.resolution / config.eval.crop_pct), config.eval.interpolation
    else:
        each, side, filter = (
            f"{dataset.frames} frames of {config.data.seconds:g} s, of each ",
            config.eval.short_side,
            "bilinear",
        )
    middle = f"the middle {dataset.resolution} x {dataset.resolution} pixels after resizing the shorter side to {side}"
    then = "" if resolution == dataset.resolution else f", resized to {resolution} x {resolution} (bilinear)"
    return f"{each}{middle} ({filter}, antialiased){then}"


def _scores(workdir: epath.Path, step: int, *, ema: bool) -> dict[str, dict[str, float]]:
    """Of the test images, by resolution, as the run's results.json has them if they are of this step."""
    path = workdir / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if results.get("step") != step:
        return {}
    return {
        resolution: {name.removeprefix("ema_"): x for name, x in scores.items() if name.startswith("ema_") == ema}
        for resolution, scores in results["test"].items()
    }


def _readme(metadata: dict[str, Any]) -> str:
    """How the function is used."""
    shape = metadata["images"]["shape"]
    one = "names[row.argmax()]" if metadata["logits"]["of"] == "softmax" else "[n for n, x in zip(names, row) if x > 0]"
    return _README.substitute(
        title=f"{metadata['network']}, trained on {metadata['dataset']}",
        images=f"uint8, {tuple(shape)}, {metadata['images']['channels']}".replace("'", ""),
        preparation=metadata["images"]["preparation"],
        classes=metadata["logits"]["shape"][1],
        of=metadata["logits"]["of"],
        example=(2, *shape[1:]),
        one=one,
        platforms=", ".join(metadata["platforms"]),
        jax=metadata["versions"]["jax"],
    )


@contextlib.contextmanager
def _whole(folder: epath.Path) -> Iterator[epath.Path]:
    """A folder to fill, which then becomes `folder`, or is removed if it could not be filled."""
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    unfinished.mkdir()
    try:
        yield unfinished
        unfinished.replace(folder)
    finally:
        if unfinished.exists():
            unfinished.rmtree()


if __name__ == "__main__":
    _OUT = flags.DEFINE_string("out", None, "The folder, or the file FILE.safetensors.", required=True)
    _EMA = flags.DEFINE_bool("ema", False, "Write the averaged parameters.")
    run_command(
        lambda: export(
            config_flag.value, CHECKPOINT.value, _OUT.value, ema=_EMA.value, resolution=flags.FLAGS.resolution
        )
    )
