"""From a source to batches: shuffled and augmented for training, in order and padded for evaluation.

An example that is read is a function of the source, the seed and the number of its row since the start of training, and
of nothing else: not of threads, worker processes, hosts or where a run was interrupted.

Where examples are of several shapes, `groups`, (n,) integers, tells which are of one: a batch has examples of one group
only.
"""

import dataclasses
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np
from absl import flags, logging

from ssm_jax.data.datasets import Source
from ssm_jax.data.decode import BrokenExampleError

_READ_AHEAD = 4
"""Batches, at least."""

_TRIES = 100


class BrokenDataError(RuntimeError):
    """Too many examples cannot be read."""


def train_batches(
    source: Source,
    *,
    batch_size: int,
    transform: Callable[[Any, np.random.Generator], dict[str, Any]],
    seed: int,
    groups: np.ndarray | None = None,
    start: int = 0,
    repeats: int = 1,
    threads: int = 1,
    workers: int = 0,
    max_broken: float = 0.01,
) -> "Batches":
    """Endless batches of this process's rows: what `transform` gives, such as {"image": (b, ...), "label": (b,)}.

    Every epoch has its own order, and every example of every epoch its own augmentation.

    Args:
        source: the examples.
        batch_size: rows of a batch over all processes.
        transform: decodes and augments an example, with all randomness from the generator.
        seed: of order and augmentation.
        groups: of each example. An epoch is then one of whole batches, see `batches_per_epoch`, in an order of its own;
            in each group some examples come once more than others, other ones in every epoch, to fill up its last
            batch. mmdetection's GroupSampler.
        start: number of the first batch: that of the training step, when a run goes on.
        repeats: times that an example is in an epoch, one after the other, each time augmented anew; an epoch has as
            many rows as before, and so only 1 / repeats of the examples (repeated augmentation, arXiv:1901.09335, as in
            DeiT).
        threads: in which this process reads, if there are no `workers`, each a batch of its own. More than one pays for
            large images only: of small ones they spend their time waiting for the interpreter's lock.
        workers: processes that read.
        max_broken: share of the examples that may be unreadable; others take their places, chosen by the row's
            generator, of the same group.
    """
    if groups is None:
        order = _Mixed(_Shuffled.of(len(source), seed), repeats)
    else:
        order = _Grouped.of(_examples(source, groups), batch_size, seed, repeats)
    read = _TrainRow(source, transform, seed, order)
    return Batches(_batched(read, batch_size, range(start, sys.maxsize), threads, workers), source, max_broken)


def batches_per_epoch(source: Source, batch_size: int, groups: np.ndarray | None = None) -> int:
    """Of training: whole batches that there are; with `groups` the last of each group is filled up and counts, too."""
    if groups is None:
        return len(source) // batch_size
    return sum(_whole_batches(_examples(source, groups), batch_size))


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    transform: Callable[[Any], dict[str, Any]],
    groups: np.ndarray | None = None,
    threads: int = 1,
    workers: int = 0,
    max_broken: float = 0.01,
    broken: set[int] | None = None,
) -> "Batches":
    """All examples once, in order, group by group, each with `index` () int32, its number in the source.

    `mask` () bool is False for unreadable ones, and for rows that fill up the last batch of a group.

    The arguments are those of `train_batches`, and `broken`, a set for the numbers of what cannot be read: those that
    it has already are not reported again.
    """
    read = _EvalRow.of(source, transform, _examples(source, groups), batch_size)
    batches = _batched(read, batch_size, range(len(read.order) // batch_size), threads, workers)
    return Batches(batches, source, max_broken, broken)


class Batches(Iterator[dict[str, np.ndarray]]):
    """An iterator over batches that names what cannot be read, once, and raises BrokenDataError when it is too much."""

    def __init__(
        self,
        batches: Iterator[dict[str, np.ndarray]],
        source: Source,
        max_broken: float,
        broken: set[int] | None = None,
    ):
        """`batches` have the numbers of broken examples in `broken`; those of the set `broken` are known."""
        self._batches, self._source, self._max_broken = batches, source, max_broken
        self.broken = set() if broken is None else broken
        """Numbers of the examples that could not be read so far, by this process."""

    def __next__(self) -> dict[str, np.ndarray]:
        batch = dict(next(self._batches))
        found = batch.pop("broken")
        for index in sorted({*found[found >= 0].tolist()} - self.broken):
            self.broken.add(index)
            name, count = self._source.name(index), len(self._source)
            logging.warning("%s cannot be read, %d of %d examples so far.", name, len(self.broken), count)
        if len(self.broken) > self._max_broken * len(self._source):
            raise BrokenDataError(
                f"{len(self.broken)} of {len(self._source)} examples cannot be read, more than "
                f"config.data.max_broken={self._max_broken} of them; one is {self._source.name(min(self.broken))}."
            )
        return batch


# Instances, and no closures, because worker processes get them pickled.


@dataclasses.dataclass(frozen=True)
class _Shuffled:
    """The numbers below `count`, in every epoch in another order."""

    count: int
    numbers: grain.MapDataset

    @classmethod
    def of(cls, count: int, seed: int) -> "_Shuffled":
        return cls(count, grain.MapDataset.range(count).seed(seed).shuffle().repeat())

    def __call__(self, epoch: int, place: int) -> int:
        number: Any = self.numbers[epoch * self.count + place]
        return int(number)


@dataclasses.dataclass(frozen=True)
class _Mixed:
    """Which example is in a row where all are alike: epoch follows epoch, wherever batches begin."""

    examples: _Shuffled
    repeats: int

    def __call__(self, row: int) -> int:
        epoch, place = divmod(row, self.examples.count)
        return self.examples(epoch, place // self.repeats)

    def another(self, index: int, rng: np.random.Generator) -> int:
        """One that can take the place of the example `index`."""
        del index
        return int(rng.integers(self.examples.count))


@dataclasses.dataclass(frozen=True)
class _Grouped:
    """Which example is in a row where a batch has those of one group."""

    groups: tuple[np.ndarray, ...]
    shuffled: tuple[_Shuffled, ...]
    """Of each group."""
    batches: _Shuffled
    """Of an epoch, numbered group by group."""
    starts: np.ndarray
    """(groups,): the number of each group's first batch."""
    batch_size: int
    repeats: int

    @classmethod
    def of(cls, groups: tuple[np.ndarray, ...], batch_size: int, seed: int, repeats: int) -> "_Grouped":
        *starts, count = np.cumsum([0, *_whole_batches(groups, batch_size)]).tolist()
        shuffled = tuple(_Shuffled.of(len(group), seed) for group in groups)
        return cls(groups, shuffled, _Shuffled.of(count, seed), np.array(starts), batch_size, repeats)

    def __call__(self, row: int) -> int:
        number, column = divmod(row, self.batch_size)
        epoch, place = divmod(number, self.batches.count)
        batch = self.batches(epoch, place)
        i = int(np.searchsorted(self.starts, batch, "right")) - 1
        place = (batch - int(self.starts[i])) * self.batch_size + column
        group, shuffled = self.groups[i], self.shuffled[i]
        return int(group[shuffled(epoch, place // self.repeats % len(group))])

    def another(self, index: int, rng: np.random.Generator) -> int:
        """One that can take the place of the example `index`."""
        (group,) = (group for group in self.groups if index in group)
        return int(rng.choice(group))


def _examples(source: Source, groups: np.ndarray | None) -> tuple[np.ndarray, ...]:
    """The numbers of each group's examples, ascending."""
    if groups is None:
        return (np.arange(len(source)),)
    if groups.shape != (len(source),):
        raise ValueError(f"groups must have a number for each of the {len(source)} examples, got {groups.shape}.")
    return tuple(np.flatnonzero(groups == group) for group in np.unique(groups))


def _whole_batches(groups: tuple[np.ndarray, ...], batch_size: int) -> list[int]:
    """How many batches each group fills, the last of them only in part."""
    return [-(-len(group) // batch_size) for group in groups]


@dataclasses.dataclass(frozen=True)
class _TrainRow:
    source: Source
    transform: Callable[[Any, np.random.Generator], dict[str, Any]]
    seed: int
    order: _Mixed | _Grouped

    def __call__(self, row: int) -> dict[str, Any]:
        rng = np.random.Generator(np.random.Philox(key=[self.seed, row]))
        another = functools.partial(self.order.another, rng=rng)
        return _read(lambda i: self.transform(self.source[i], rng), self.order(row), another)


@dataclasses.dataclass(frozen=True)
class _EvalRow:
    source: Source
    transform: Callable[[Any], dict[str, Any]]
    order: np.ndarray
    """(rows,): the example in each."""
    counts: np.ndarray
    """(rows,) bool: whether it is there for the first time."""
    following: np.ndarray
    """(examples,): the next of the same group."""

    @classmethod
    def of(
        cls,
        source: Source,
        transform: Callable[[Any], dict[str, Any]],
        groups: tuple[np.ndarray, ...],
        batch_size: int,
    ) -> "_EvalRow":
        sizes = [count * batch_size for count in _whole_batches(groups, batch_size)]
        order = np.concatenate([np.resize(group, size) for group, size in zip(groups, sizes, strict=True)])
        counts = np.concatenate([np.arange(size) < len(group) for group, size in zip(groups, sizes, strict=True)])
        following = np.empty(len(source), np.int64)
        for group in groups:
            following[group] = np.roll(group, -1)
        return cls(source, transform, order, counts, following)

    def __call__(self, row: int) -> dict[str, Any]:
        index = int(self.order[row])
        example = _read(lambda i: self.transform(self.source[i]), index, lambda i: int(self.following[i]))
        mask = np.bool_(self.counts[row] and example["broken"] < 0)
        return {**example, "index": np.int32(index), "mask": mask}


def _read(read: Callable[[int], dict[str, Any]], index: int, another: Callable[[int], int]) -> dict[str, Any]:
    """The example `index`, or where it is broken, the first of others that is not; `broken` tells which one was."""
    broken, last = -1, None
    for _ in range(_TRIES):
        try:
            return {**read(index), "broken": np.int64(broken)}
        except BrokenExampleError as error:
            last = error
            broken = index if broken < 0 else broken
            index = another(index)
    raise BrokenDataError(f"{_TRIES} examples one after the other cannot be read, the last because: {last}")


@dataclasses.dataclass(frozen=True)
class _Batch:
    read: Callable[[int], dict[str, Any]]
    batch_size: int
    first: int
    rows: int

    def __call__(self, number: int) -> dict[str, np.ndarray]:
        start = number * self.batch_size + self.first
        examples = [self.read(row) for row in range(start, start + self.rows)]
        return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def _batched(
    read: Callable[[int], dict[str, Any]], batch_size: int, numbers: range, threads: int, workers: int
) -> Iterator[dict[str, np.ndarray]]:
    """Rows of the batches `numbers` that belong to this process, read ahead."""
    # Whole parts are dealt out, so that the rows of all processes, one after the other, are in order.
    rows = batch_size // jax.process_count()
    batch = _Batch(read, batch_size, jax.process_index() * rows, rows)
    threads = 1 if workers else threads
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, _READ_AHEAD))
    batches = grain.MapDataset.range(numbers.start, numbers.stop).map(batch).to_iter_dataset(ahead)
    if workers:
        if not flags.FLAGS.is_parsed():  # in a notebook; grain hands the flags to its processes
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2), worker_init_fn=_begin_worker
        )
    return iter(batches)


def _begin_worker(number: int, count: int) -> None:
    """Lets a worker live as long as the process that it reads for, which a signal, such as Ctrl-C, may let go on."""
    del number, count
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    reader = multiprocessing.parent_process()
    assert reader is not None
    threading.Thread(target=lambda: (reader.join(), os._exit(1)), daemon=True).start()
