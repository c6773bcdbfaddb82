import itertools
import json

import jax
import numpy as np
import pytest

from ssm_jax.data.augment import Augment
from ssm_jax.data.pipeline import eval_batches, train_batches

COUNT = 23
SOURCE = [
    {"image": np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8), "label": np.int64(i), "id": str(i)}
    for i in range(COUNT)
]
"""Images that differ, and labels that tell them apart."""

AUGMENT = Augment(crop_padding=1, flip=True)


def training(batch_size=5, augment=AUGMENT, seed=0):
    return train_batches(SOURCE, batch_size=batch_size, augment=augment, seed=seed)


def take(batches, count):
    return list(itertools.islice(batches, count))


def labels(batches):
    return np.concatenate([batch["label"] for batch in batches])


def assert_equal_batches(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def joined(parts):
    """The rows of all processes, one after the other, batch by batch."""
    batches = zip(*parts, strict=True)
    return [{name: np.concatenate([rows[name] for rows in batch]) for name in batch[0]} for batch in batches]


@pytest.fixture
def on_process(monkeypatch):
    """Runs a function as one process of several would."""

    def run(index, count, make_batches):
        with monkeypatch.context() as patched:
            patched.setattr(jax, "process_index", lambda: index)
            patched.setattr(jax, "process_count", lambda: count)
            return make_batches()

    return run


@pytest.mark.parametrize("batch_size", [1, 5, 23])
def test_every_epoch_has_every_example_once(batch_size):
    seen = labels(take(training(batch_size), 3 * COUNT))[: 3 * COUNT].reshape(3, COUNT)
    for epoch in seen:
        assert sorted(epoch) == list(range(COUNT))


def test_every_epoch_has_its_own_order():
    epochs = labels(take(training(batch_size=COUNT), 4)).reshape(4, COUNT)
    orders = {tuple(epoch) for epoch in epochs} | {tuple(range(COUNT))}
    assert len(orders) == 5


def test_every_epoch_has_its_own_augmentation():
    first, second = (dict(zip(b["label"], b["image"], strict=True)) for b in take(training(batch_size=COUNT), 2))
    assert any((first[label] != second[label]).any() for label in first)


def test_without_augmentation_images_are_the_sources():
    (batch,) = take(training(batch_size=COUNT, augment=Augment()), 1)
    for image, label in zip(batch["image"], batch["label"], strict=True):
        np.testing.assert_array_equal(image, SOURCE[label]["image"])


def test_the_same_seed_gives_the_same_batches():
    assert_equal_batches(take(training(seed=3), 12), take(training(seed=3), 12))


def test_another_seed_gives_another_order():
    assert labels(take(training(seed=3), 4)).tolist() != labels(take(training(seed=4), 4)).tolist()


def test_another_seed_gives_another_augmentation():
    one, other = (take(training(batch_size=COUNT, seed=seed), 1)[0] for seed in [3, 4])
    one, other = (dict(zip(batch["label"], batch["image"], strict=True)) for batch in [one, other])
    assert any((one[label] != other[label]).any() for label in one)


@pytest.mark.parametrize("taken", [0, 1, 4, 17])
def test_a_restored_position_gives_the_very_same_batches(taken):
    batches = training()
    take(batches, taken)
    position = json.loads(json.dumps(batches.get_state()))
    expected = take(batches, 9)
    resumed = training()
    resumed.set_state(position)
    assert_equal_batches(take(resumed, 9), expected)


def test_the_position_is_the_number_of_batches_taken_not_read_ahead():
    batches = training()
    take(batches, 7)
    assert 7 in batches.get_state().values()


def test_a_position_can_be_gone_back_to_in_the_same_iterator():
    batches = training()
    take(batches, 2)
    position = batches.get_state()
    expected = take(batches, 5)
    batches.set_state(position)
    assert_equal_batches(take(batches, 5), expected)


def test_training_batches_have_images_and_labels_alone():
    (batch,) = take(training(batch_size=6), 1)
    assert {name: (rows.shape, rows.dtype) for name, rows in batch.items()} == {
        "image": ((6, 4, 4, 3), np.uint8),
        "label": ((6,), np.int32),
    }


def test_evaluation_batches_have_a_mask_besides():
    (batch, *_) = eval_batches(SOURCE, batch_size=6)
    assert {name: (rows.shape, rows.dtype) for name, rows in batch.items()} == {
        "image": ((6, 4, 4, 3), np.uint8),
        "label": ((6,), np.int32),
        "mask": ((6,), np.bool_),
    }


@pytest.mark.parametrize("batch_size", [1, 5, 22, 23, 24, 46, 100])
def test_evaluation_has_every_example_once_in_order(batch_size):
    batches = list(eval_batches(SOURCE, batch_size=batch_size))
    mask = np.concatenate([batch["mask"] for batch in batches])
    assert labels(batches)[mask].tolist() == list(range(COUNT))
    images = np.concatenate([batch["image"] for batch in batches])[mask]
    np.testing.assert_array_equal(images, [example["image"] for example in SOURCE])


@pytest.mark.parametrize("batch_size", [1, 5, 22, 23, 24, 46, 100])
def test_evaluation_batches_are_full_and_as_few_as_can_be(batch_size):
    batches = list(eval_batches(SOURCE, batch_size=batch_size))
    assert len(batches) == int(np.ceil(COUNT / batch_size))
    assert {len(batch["label"]) for batch in batches} == {batch_size}


@pytest.mark.parametrize("processes", [2, 3])
def test_training_rows_of_all_processes_are_those_of_one_in_order(on_process, processes):
    whole = take(training(batch_size=6), 10)
    parts = [take(on_process(i, processes, lambda: training(batch_size=6)), 10) for i in range(processes)]
    assert_equal_batches(joined(parts), whole)


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("batch_size", [6, 12, 24])
def test_evaluation_rows_of_all_processes_are_those_of_one_in_order(on_process, processes, batch_size):
    whole = list(eval_batches(SOURCE, batch_size=batch_size))
    parts = [
        list(on_process(i, processes, lambda: eval_batches(SOURCE, batch_size=batch_size))) for i in range(processes)
    ]
    assert [len(part) for part in parts] == [len(whole)] * processes
    assert_equal_batches(joined(parts), whole)


def test_a_process_restores_its_own_rows(on_process):
    def second():
        return on_process(1, 2, lambda: training(batch_size=6))

    batches = second()
    take(batches, 3)
    position, expected = batches.get_state(), take(batches, 4)
    resumed = second()
    resumed.set_state(position)
    assert_equal_batches(take(resumed, 4), expected)


def test_positions_are_the_same_on_all_processes(on_process):
    states = []
    for i in range(2):
        batches = on_process(i, 2, lambda: training(batch_size=6))
        take(batches, 3)
        states.append(batches.get_state())
    assert states[0] == states[1]
