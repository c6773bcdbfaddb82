r"""How fast images are read and augmented, against what else a user would take, and whether training waits for them.

    pip install torch torchvision timm 'pillow<13'  # timm 1.0.31 posterises to 0 bits, which Pillow 13 refuses
    python -m benchmarks.input_pipeline [--images=FOLDER] [--cores=4] [--parts=tables,scaling,profile,waiting,training]

FOLDER has train/CLASS/*.JPEG and val/CLASS/*.JPEG; without it files with the sizes and the spectrum of photographs are
made. All of them are in the system's cache, so disks are not measured. Contestants, each with the same recipe and the
same Pillow: `ssm_jax.data.pipeline`; plain grain, with our transform, in parallel over batches; torchvision's
ImageFolder and PyTorch's DataLoader with timm's transform, if those are installed. What is done on the device (erasing,
mixing, normalising) is left out of all. Every turn is a process of its own, pinned to the cores that it may use, and
contestants take turns: figures are medians of the rounds, with the extremes. Images per CPU second, of all processes
together, are what one core in use reads; other programs on the machine disturb them less than images per second.

Parts: `tables`, the contestants by recipe; `scaling`, on more and more cores; `profile`, what an image's time goes
into; `waiting`, a loop that sleeps where a device would compute, at several rates; `training`, training on this
machine, against the same steps on a batch that is there already. Writes input_pipeline.json into `--out`. For Linux.
"""

import concurrent.futures
import dataclasses
import functools
import importlib
import importlib.util
import itertools
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import app, flags
from numpy.typing import ArrayLike
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.side_by_side import CORES, ROUNDS, pin, save, surroundings
from experiments.experiment import build
from ssm_jax.data.augment import Augment, CenterCrop
from ssm_jax.data.datasets import Source
from ssm_jax.data.decode import decode_image
from ssm_jax.data.image_folder import image_folder
from ssm_jax.data.pipeline import eval_batches, train_batches

RECIPES = {
    "training, 224 x 224": Augment(
        size=224, crop_scale=(0.08, 1.0), interpolation="random", flip=True, rand_augment="rand-m9-mstd0.5-inc1"
    ),
    "evaluation, 256 to 224 x 224": CenterCrop(size=224, crop_pct=0.875),
    "training, 32 x 32": Augment(crop_padding=4, flip=True),
}
TRAINING, EVALUATION, SMALL = RECIPES

CHIP = {"ResNet-50": 37.8, "DeiT-S": 46.3, "Swin-T": 162.6, "ConvNeXt-T": 73.3}
"""Milliseconds of a step of 64 images on one TPU v5e chip, as XLA estimates them: benchmarks/compiled_backbones.py."""

CONFIGS = {
    "DeiT-S, 224 x 224": ("configs.s6la.imagenet_deit_small", {"dtype": "float32", "batch_size": 8}, 3),
    "small ResNet, 64 x 64": ("configs.backbones.image_folder:resnet", {"batch_size": 50}, 24),
}
"""What is trained, in what it differs from its recipe to run on a CPU, and for how many steps at a time."""

LOADS = (1.2, 0.9, 0.8, 0.5)
"""Images per second that a device takes, as parts of what is read when nothing waits."""

_PARTS = flags.DEFINE_list("parts", "tables,scaling,profile,waiting,training", "Which parts.")
_IMAGES = flags.DEFINE_string("images", None, "Folder of images; by default they are made.")
_SECONDS = flags.DEFINE_float("seconds", 4.0, "Least duration of a measurement.", lower_bound=0.0)
_ROWS = flags.DEFINE_integer("rows", 64, "Images of a batch.", lower_bound=1)


class Task(NamedTuple):
    """What is read, and for how long."""

    folder: str
    transform: Augment | CenterCrop
    rows: int
    seconds: float


class Reader(NamedTuple):
    """A contestant."""

    library: str
    cores: int
    threads: int = 1
    workers: int = 0

    def __str__(self) -> str:
        count, kind = (self.workers, "worker") if self.workers else (self.threads, "thread")
        return f"{self.library}, {count} {kind}{'s' * (count > 1)}"


@dataclasses.dataclass(frozen=True)
class Repeated:
    """A source again and again, as many examples as ImageNet has: to shuffle few of them would take longer."""

    source: Source

    def __len__(self) -> int:
        return 1_281_167

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.source[index % len(self.source)]

    def name(self, index: int) -> str:
        """That of the example."""
        return self.source.name(index % len(self.source))


def images_in(folder: str) -> Repeated:
    """The training images."""
    return Repeated(image_folder(folder).splits["train"])


def by_ssm_jax(task: Task, reader: Reader) -> Iterable[Any]:
    """Ours."""
    source = images_in(task.folder)
    options: dict[str, Any] = {"batch_size": task.rows, "threads": reader.threads, "workers": reader.workers}
    if isinstance(task.transform, CenterCrop):
        return eval_batches(source, transform=task.transform, **options)
    return train_batches(source, transform=task.transform, seed=0, **options)


def by_grain(task: Task, reader: Reader) -> Iterable[Any]:
    """Grain as its documentation has it, with as many batches in work as there are threads."""
    examples = grain.MapDataset.source(images_in(task.folder)).seed(0).shuffle().repeat()
    apply: Any = examples.map if isinstance(task.transform, CenterCrop) else examples.random_map
    options = grain.ReadOptions(num_threads=reader.threads, prefetch_buffer_size=2 * reader.threads)
    batches = apply(task.transform).batch(task.rows).to_iter_dataset(options)
    if reader.workers:
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=reader.workers))
    return batches


def by_timm(task: Task, reader: Reader) -> Iterable[Any]:
    """PyTorch's DataLoader with timm's transform, and its way to make a batch of bytes."""
    import torch
    from timm.data.loader import fast_collate
    from torchvision.datasets import ImageFolder

    images = ImageFolder(f"{task.folder}/train", timm_transform(task.transform))
    options: dict[str, Any] = {
        "sampler": torch.utils.data.RandomSampler(images, num_samples=1 << 40),  # again and again, each time anew
        "collate_fn": fast_collate,
        "num_workers": reader.workers,
        "multiprocessing_context": "fork",  # the default, were this process not spawned itself
    }
    return torch.utils.data.DataLoader(images, task.rows, **options)


def timm_transform(ours: Augment | CenterCrop) -> Any:
    """The counterpart in timm of a recipe, from an image to a tensor of bytes."""
    from timm.data import create_transform
    from torchvision import transforms

    options: dict[str, Any] = {"interpolation": ours.interpolation, "use_prefetcher": True}
    if isinstance(ours, CenterCrop):
        return create_transform(ours.size, crop_pct=ours.crop_pct, **options)
    if ours.size is None:  # timm has none of these
        crop = transforms.RandomCrop(32, ours.crop_padding, padding_mode="symmetric")
        return transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.PILToTensor()])
    options |= {"scale": ours.crop_scale, "auto_augment": ours.rand_augment}
    return create_transform(ours.size, is_training=True, **options)


LIBRARIES: dict[str, Callable[[Task, Reader], Iterable[Any]]] = {
    "ssm_jax": by_ssm_jax,
    "grain": by_grain,
    "timm": by_timm,
}


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a process of its own, so that nothing of other turns is left there."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_on_cpu, function, *arguments).result()


def _on_cpu(function: Callable[..., Any], *arguments: Any) -> Any:
    jax.config.update("jax_platforms", "cpu")
    flags.FLAGS.mark_as_parsed()  # grain hands them to its workers
    return function(*arguments)


def start(task: Task, reader: Reader) -> tuple[Iterator[Any], float]:
    """Batches, once all threads or workers are at work, and the seconds until the first of them."""
    pin(reader.cores)
    batches = LIBRARIES[reader.library](task, reader)
    begin = time.perf_counter()
    batches = iter(batches)
    next(batches)
    first = time.perf_counter() - begin
    for _ in range(_together(reader) * 2):  # what was read ahead
        next(batches)
    return batches, first


def turn(task: Task, reader: Reader) -> dict[str, float]:
    """What a contestant does: images per second, CPU seconds per image, seconds to start, and megabytes."""
    batches, first = start(task, reader)
    begin, used = time.perf_counter(), cpu_seconds()
    images = 0
    while (elapsed := time.perf_counter() - begin) < task.seconds or not images:
        for _ in range(_together(reader)):  # workers hand over theirs at about the same time
            next(batches)
            images += task.rows
    return {
        "images_per_second": images / elapsed,
        "cpu_seconds": (cpu_seconds() - used) / images,
        "first_batch": first,
        "megabytes": megabytes(),
    }


def _together(reader: Reader) -> int:
    """Batches that are in work at the same time."""
    return max(reader.workers, reader.threads)


def cpu_seconds() -> float:
    """Processor seconds of this process and its workers, until now."""

    def of(process: int) -> float:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # in user mode, and in the system's

    return sum(map(of, _processes()))


def megabytes() -> float:
    """Memory of this process and its workers; what they share is counted once."""
    rollups = (Path(f"/proc/{process}/smaps_rollup").read_text() for process in _processes())
    return sum(int(re.findall(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)[0]) for text in rollups) / 1e3


def _processes() -> list[int]:
    return [os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid)]


def rounds(turns: Mapping[str, Callable[[], Mapping[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """Calls each function in turns; its results by name, one for each round."""
    results: dict[str, list[Mapping[str, float]]] = {name: [] for name in turns}
    for _ in range(ROUNDS.value):
        for name, function in turns.items():
            results[name].append(function())
    return {name: {field: [row[field] for row in rows] for field in rows[0]} for name, rows in results.items()}


def measured(task: Task, readers: Sequence[Reader]) -> dict[str, dict[str, list[float]]]:
    """`turn` of each contestant, in turns."""
    return rounds({str(reader): functools.partial(apart, turn, task, reader) for reader in readers})


def contestants(cores: int) -> list[Reader]:
    """All of them on as many cores; timm has no threads."""
    parallel = [("ssm_jax", {"threads": cores}), ("ssm_jax", {"workers": cores})]
    parallel += [("grain", {"threads": cores}), ("grain", {"workers": cores})]
    parallel += [("timm", {"workers": cores})] * has_timm()
    return [Reader("ssm_jax", cores), *(Reader(library, cores, **how) for library, how in parallel)]


def has_timm() -> bool:
    """Whether PyTorch's and timm's packages are there."""
    return all(map(importlib.util.find_spec, ("torch", "torchvision", "timm")))


def disagreement(task: Task) -> int:
    """The largest difference of a pixel between timm's evaluation images and ours: they are to be the same."""
    from torchvision.datasets import ImageFolder

    theirs = ImageFolder(f"{task.folder}/train", timm_transform(task.transform))
    source, ours = images_in(task.folder), task.transform
    assert isinstance(ours, CenterCrop), "without randomness"
    pairs = ((ours(source[i])["image"], theirs[i][0].numpy()) for i in range(min(32, len(theirs))))
    return max(int(np.abs(np.moveaxis(their, 0, -1) - mine.astype(int)).max()) for mine, their in pairs)


def profile(task: Task) -> dict[str, float]:
    """CPU seconds per image of a transform's parts, by their ends: each number contains those before it."""
    pin(1)
    source = images_in(task.folder)
    recipe = task.transform
    assert isinstance(recipe, Augment), "the training images'"
    crop = dataclasses.replace(recipe, flip=False, rand_augment="")
    order = grain.MapDataset.range(len(source)).seed(0).shuffle().repeat()

    def generator(row: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[0, row]))

    pixels = recipe(source[0], generator(0))["image"]
    parts: dict[str, Callable[[int], Any]] = {
        "read the file": lambda row: source[row],
        "decode": lambda row: decode_image(source[row]["image"]),
        "crop and resize": lambda row: crop(source[row], generator(row)),
        "flip, RandAugment": lambda row: recipe(source[row], generator(row)),
        "shuffle": lambda row: order[row],
        "generator": generator,
        "stack": lambda row: None if row % task.rows else np.stack([pixels.copy()] * task.rows),
    }
    seconds = dict.fromkeys(parts, 0.0)
    images = 0
    begin = time.perf_counter()
    while time.perf_counter() - begin < task.seconds:
        for name, part in parts.items():
            before = time.thread_time()
            for row in range(images, images + task.rows):
                part(row)
            seconds[name] += time.thread_time() - before
        images += task.rows
    return {name: second / images for name, second in seconds.items()}


def wait(task: Task, reader: Reader) -> dict[str, float]:
    """Shares of its time that a loop waits for batches, whose device would take `LOADS` of what can be read."""
    batches, _ = start(task, reader)

    def loop(seconds: float, pause: float) -> tuple[float, float]:
        waited, steps, begin = 0.0, 0, time.perf_counter()
        while (elapsed := time.perf_counter() - begin) < seconds or steps % _together(reader):
            before = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - before
            time.sleep(pause)
            steps += 1
        return waited / elapsed, elapsed / steps

    _, fastest = loop(task.seconds, 0.0)
    shares = {}
    for load in LOADS:  # downwards, as what is read ahead while it sleeps would hide that too much is asked for
        loop(task.seconds, fastest / load)
        shares[str(load)], _ = loop(task.seconds, fastest / load)
    return shares


def train(name: str, folder: str, cores: int, workers: Sequence[int], turns: int) -> dict[str, dict[str, list[float]]]:
    """Trains, in turns with the same steps on one batch.

    Returns:
        By the number of workers: `step`, seconds of a step; `there`, where the batch is there; `waited`, of the former,
        in the main thread, which is ahead of the device's.
    """
    pin(cores)
    module, differences, steps = CONFIGS[name]
    path, _, variant = module.partition(":")
    config = importlib.import_module(path).get_config(*[variant] * bool(variant))
    config.update(differences)
    config.data.update(name="image_folder", dir=folder)
    experiment = build(config)
    results: dict[str, dict[str, list[float]]] = {}
    with jax.set_mesh(experiment.mesh):
        state = experiment.init()
        step = experiment.train_step(experiment.stages[0])

        def run(batches: Iterator[Any]) -> tuple[float, float]:
            nonlocal state
            waited, begin = 0.0, time.perf_counter()
            for _ in range(steps):
                before = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - before
                state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            return (time.perf_counter() - begin) / steps, waited / steps

        for count in workers:
            config.data.workers = count
            readers = f"{count} worker{'s' * (count > 1)}" if count else "threads"
            each = results[readers] = {"step": [], "there": [], "waited": []}
            batches = map(experiment.put, experiment.train_batches())
            one = itertools.repeat(next(batches))
            run(one)  # compiles
            for _ in range(turns):
                each["there"].append(run(one)[0])
                run(batches)  # what was read ahead meanwhile
                seconds, waited = run(batches)
                each["step"].append(seconds)
                each["waited"].append(waited)
    return results


def make_images(folder: Path, count: int, width: int, height: int, suffix: str) -> None:
    """Noise whose amplitude falls as 1 / frequency, as that of photographs, as train/CLASS/NAME and val/CLASS/NAME.

    Colours are correlated as theirs are. At quality 90, JPEG files of 500 x 375 pixels have the size of ImageNet's.
    """
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1.0
    colors = np.array([[1.0, 0.3, 0.15], [1.0, 0.0, -0.2], [1.0, -0.3, 0.15]])  # of brightness and two hues
    for index in range(count):
        planes = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(3, height, width))) / frequency, s=(height, width))
        planes /= planes.std((1, 2), keepdims=True)
        pixels = np.clip(118 + 45 * np.einsum("ck,khw->hwc", colors, planes), 0, 255).astype(np.uint8)
        for split in ("train", "val"):
            if split == "train" or index < 2:
                path = folder / split / str(index % 2) / f"{index}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path, quality=90)


def mean_kilobytes(folder: Path) -> float:
    """Of the training images' files; reading them all also puts them into the system's cache."""
    return float(np.mean([len(path.read_bytes()) for path in (folder / "train").glob("*/*")])) / 1e3


def spread(values: ArrayLike, digits: int = 0) -> str:
    """The median, and the extremes."""
    low, median, high = np.quantile(np.asarray(values, float), (0, 0.5, 1))
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """The first column is text, and the others are numbers."""
    result = Table(title=title)
    for i, column in enumerate(columns):
        result.add_column(column, justify="right" if i else "left")
    for row in rows:
        result.add_row(*row)
    return result


def table_of_readers(title: str, results: Mapping[str, Mapping[str, Sequence[float]]]) -> Table:
    """A row for each contestant; its CPU time is a multiple of that of our workers, in the same round."""
    columns = ["reader", "images/s", "cores busy", "images per CPU second", "CPU time, ratio", "first batch, s", "MB"]
    ours, rows = _last_of_ours(results), []
    for name, each in results.items():
        rate, cpu = np.array(each["images_per_second"]), np.array(each["cpu_seconds"])
        busy = f"{np.median(rate * cpu):.1f}"
        rest = f"{np.median(each['first_batch']):.1f}", f"{np.median(each['megabytes']):.0f}"
        rows.append([name, spread(rate), busy, spread(1 / cpu), spread(cpu / ours, 2), *rest])
    return table(title, columns, rows)


def _last_of_ours(results: Mapping[str, Mapping[str, Sequence[float]]]) -> np.ndarray:
    """CPU seconds of an image, by our workers."""
    *_, last = (each["cpu_seconds"] for name, each in results.items() if name.startswith("ssm_jax"))
    return np.array(last)


def table_of_parts(results: Mapping[str, Sequence[float]]) -> Table:
    """A row for each part of an image's time, in microseconds; those of the transform are within the next."""
    medians = {name: 1e6 * float(np.median(values)) for name, values in results.items()}
    within = ["read the file", "decode", "crop and resize", "flip, RandAugment"]
    ends = [medians[name] for name in within]
    own = {name: end - begin for name, begin, end in zip(within, [0.0, *ends], ends, strict=False)}
    own["order, generator, stack, queue"] = medians["pipeline"] - ends[-1]
    total = medians["pipeline"]
    rows = [[name, f"{value:.0f}", f"{100 * value / total:.1f}"] for name, value in own.items()]
    rows += [[f"of it, {name}", f"{medians[name]:.1f}", f"{100 * medians[name] / total:.1f}"] for name in _OWN]
    return table(
        f"{TRAINING}: CPU time of an image, one thread", ["part", "µs", "%"], [*rows, ["all", f"{total:.0f}", "100"]]
    )


_OWN = ("shuffle", "generator", "stack")
"""Of the pipeline's own work, what can be measured alone."""


def table_of_cores(rate: float) -> Table:
    """Cores that one chip needs, for images per second that a core reads."""
    rows = []
    for name, milliseconds in CHIP.items():
        needed = 64e3 / milliseconds
        rows.append([name, f"{needed:.0f}", f"{needed / rate:.1f}", f"{needed / rate / 0.8:.1f}"])
    columns = ["network", "images/s of a chip", "cores", "cores, a fifth idle"]
    return table(f"cores for one TPU v5e chip (estimated), at {rate:.0f} images per CPU second", columns, rows)


def table_of_training(title: str, results: Mapping[str, Mapping[str, Sequence[float]]]) -> Table:
    """A row for each number of workers."""
    rows = []
    for name, each in results.items():
        step, there, waited = (np.array(each[field]) for field in ("step", "there", "waited"))
        lost, share = 100 * (1 - there / step), 100 * waited / step
        rows.append([name, spread(1e3 * there), spread(1e3 * step), spread(lost, 1), spread(share, 1)])
    return table(title, ["reading", "step, batch there, ms", "step, ms", "lost, %", "main thread waits, %"], rows)


def main(_: list[str]) -> None:
    """Measures, prints and saves."""
    known = {"tables", "scaling", "profile", "waiting", "training"}
    if unknown := {*_PARTS.value} - known:
        raise app.UsageError(f"--parts must be of {', '.join(sorted(known))}; got {', '.join(sorted(unknown))}.")
    pin(CORES.value)
    console = Console(width=160)
    where = surroundings("grain", "pillow", *["torch", "torchvision", "timm"] * has_timm())
    with tempfile.TemporaryDirectory() as made:
        folders = {SMALL: Path(made, "small")}
        make_images(folders[SMALL], 1024, 32, 32, "png")
        folders[TRAINING] = folders[EVALUATION] = Path(_IMAGES.value or f"{made}/large")
        if not _IMAGES.value:
            make_images(folders[TRAINING], 256, 500, 375, "JPEG")
        where["kilobytes"] = f"{mean_kilobytes(folders[TRAINING]):.0f}"
        where["load"] = f"{os.getloadavg()[1]:.1f}"
        console.print(where if has_timm() else f"{where}; no PyTorch with timm: only ours and grain")
        tasks = {
            name: Task(str(folders[name]), recipe, _ROWS.value, _SECONDS.value) for name, recipe in RECIPES.items()
        }
        if has_timm():
            where["disagreement"] = str(apart(disagreement, tasks[EVALUATION]))
            console.print(f"evaluation images differ from timm's by at most {where['disagreement']} of 255")
        results = {part: _MEASURES[part](tasks, console) for part in _PARTS.value}
    where["load at the end"] = f"{os.getloadavg()[1]:.1f}"
    save("input_pipeline", {"where": where, **results}, console)


def _tables(tasks: Mapping[str, Task], console: Console) -> Any:
    results = {name: measured(task, contestants(CORES.value)) for name, task in tasks.items()}
    for name, each in results.items():
        console.print(table_of_readers(f"{name}, {CORES.value} core(s): medians (extremes over the rounds)", each))
    console.print(table_of_cores(1 / float(np.median(_last_of_ours(results[TRAINING])))))
    return results


def _scaling(tasks: Mapping[str, Task], console: Console) -> Any:
    results = {}
    for cores in [n for n in (1, 2, 4, 8, 16, 32) if n <= CORES.value]:
        readers = [Reader("ssm_jax", cores, threads=cores), Reader("ssm_jax", cores, workers=cores)]
        readers += [Reader("timm", cores, workers=cores)] * has_timm()
        results[cores] = measured(tasks[TRAINING], readers)
        console.print(table_of_readers(f"{TRAINING}, {cores} core(s)", results[cores]))
    return results


def _profile(tasks: Mapping[str, Task], console: Console) -> Any:
    task = tasks[TRAINING]
    found = rounds(
        {
            "parts": functools.partial(apart, profile, task),
            "pipeline": functools.partial(apart, turn, task, Reader("ssm_jax", 1)),
        }
    )
    results = found["parts"] | {"pipeline": found["pipeline"]["cpu_seconds"]}
    console.print(table_of_parts(results))
    return results


def _waiting(tasks: Mapping[str, Task], console: Console) -> Any:
    readers = [Reader("ssm_jax", CORES.value, threads=CORES.value), Reader("ssm_jax", CORES.value, workers=CORES.value)]
    results = rounds({str(reader): functools.partial(apart, wait, tasks[TRAINING], reader) for reader in readers})
    columns = ["reader", *(f"{load:.0%}" for load in LOADS)]
    rows = [[name, *(spread(100 * np.array(shares), 1) for shares in each.values())] for name, each in results.items()]
    console.print(table("% of the time that a loop waits, by what its device takes of what can be read", columns, rows))
    return results


def _training(tasks: Mapping[str, Task], console: Console) -> Any:
    results = {}
    for name in CONFIGS:
        results[name] = apart(train, name, tasks[TRAINING].folder, CORES.value, (0, 1, CORES.value), ROUNDS.value)
        console.print(table_of_training(f"{name}, training on {CORES.value} cores that also read", results[name]))
    return results


_MEASURES = {
    "tables": _tables,
    "scaling": _scaling,
    "profile": _profile,
    "waiting": _waiting,
    "training": _training,
}


if __name__ == "__main__":
    flags.set_default(CORES, len(os.sched_getaffinity(0)))
    flags.set_default(ROUNDS, 5)
    app.run(main)
