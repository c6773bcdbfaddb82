import itertools
import logging

import jax
import numpy as np
import pytest

from ssm_jax.data.augment import Augment, CenterCrop
from ssm_jax.data.pipeline import BrokenDataError, batches_per_epoch, eval_batches, train_batches

COUNT = 23
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, 4, 4, 3), np.uint8)
"""Images that differ."""


class Images:
    """A source of images, with labels that tell them apart; those with the labels `broken` cannot be decoded."""

    def __init__(self, broken=()):
        self.broken = broken

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        image = b"no image" if index in self.broken else IMAGES[index]
        return {"image": image, "label": np.int64(index), "id": str(index)}

    def name(self, index):
        return f"image {index}"


SOURCE = Images()
AUGMENT = Augment(crop_padding=1, flip=True)


def training(batch_size=5, augment=AUGMENT, seed=0, source=SOURCE, **options):
    return train_batches(source, batch_size=batch_size, transform=augment, seed=seed, **options)


def evaluation(batch_size=5, source=SOURCE, **options):
    return eval_batches(source, batch_size=batch_size, transform=CenterCrop(size=4), **options)


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
        np.testing.assert_array_equal(image, IMAGES[label])


def test_the_same_seed_gives_the_same_batches():
    assert_equal_batches(take(training(seed=3), 12), take(training(seed=3), 12))


def test_another_seed_gives_another_order():
    assert labels(take(training(seed=3), 4)).tolist() != labels(take(training(seed=4), 4)).tolist()


def test_another_seed_gives_another_augmentation():
    one, other = (take(training(batch_size=COUNT, seed=seed), 1)[0] for seed in [3, 4])
    one, other = (dict(zip(batch["label"], batch["image"], strict=True)) for batch in [one, other])
    assert any((one[label] != other[label]).any() for label in one)


@pytest.mark.parametrize("start", [0, 1, 4, 17])
def test_batches_are_a_function_of_their_number(start):
    """So that a run goes on from the step of its checkpoint."""
    assert_equal_batches(take(training(start=start), 9), take(training(), start + 9)[start:])


@pytest.mark.parametrize("options", [{"threads": 3}, {"workers": 2}])
def test_threads_and_workers_change_nothing(options):
    assert_equal_batches(take(training(start=3, **options), 5), take(training(start=3), 5))
    assert_equal_batches(list(evaluation(6, **options)), list(evaluation(6)))


@pytest.mark.parametrize("repeats", [2, 3])
def test_an_epoch_of_repeated_examples_has_the_first_of_its_order(repeats):
    once = labels(take(training(COUNT), 2)).reshape(2, COUNT)
    for epoch, order in zip(take(training(COUNT, repeats=repeats), 2), once, strict=True):
        assert epoch["label"].tolist() == np.repeat(order, repeats)[:COUNT].tolist()


def test_repeated_examples_are_augmented_each_for_itself():
    (batch,) = take(training(batch_size=COUNT, repeats=3), 1)
    groups = [batch["image"][batch["label"] == label] for label in np.unique(batch["label"])]
    assert sum((group != group[:1]).any() for group in groups) >= 5  # of 8


def test_training_batches_have_images_and_labels_alone():
    (batch,) = take(training(batch_size=6), 1)
    assert {name: (rows.shape, rows.dtype) for name, rows in batch.items()} == {
        "image": ((6, 4, 4, 3), np.uint8),
        "label": ((6,), np.int32),
    }


def test_evaluation_batches_have_numbers_and_a_mask_besides():
    (batch, *_) = evaluation(6)
    assert {name: (rows.shape, rows.dtype) for name, rows in batch.items()} == {
        "image": ((6, 4, 4, 3), np.uint8),
        "label": ((6,), np.int32),
        "index": ((6,), np.int32),
        "mask": ((6,), np.bool_),
    }


@pytest.mark.parametrize("batch_size", [1, 5, 22, 23, 24, 46, 100])
def test_evaluation_has_every_example_once_in_order(batch_size):
    batches = list(evaluation(batch_size))
    mask = np.concatenate([batch["mask"] for batch in batches])
    assert labels(batches)[mask].tolist() == list(range(COUNT))
    assert np.concatenate([batch["index"] for batch in batches])[mask].tolist() == list(range(COUNT))
    images = np.concatenate([batch["image"] for batch in batches])[mask]
    np.testing.assert_array_equal(images, IMAGES)


@pytest.mark.parametrize("batch_size", [1, 5, 22, 23, 24, 46, 100])
def test_evaluation_batches_are_full_and_as_few_as_can_be(batch_size):
    batches = list(evaluation(batch_size))
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
    whole = list(evaluation(batch_size))
    parts = [list(on_process(i, processes, lambda: evaluation(batch_size))) for i in range(processes)]
    assert [len(part) for part in parts] == [len(whole)] * processes
    assert_equal_batches(joined(parts), whole)


def test_a_process_goes_on_with_its_own_rows(on_process):
    whole = take(on_process(1, 2, lambda: training(batch_size=6)), 7)
    assert_equal_batches(take(on_process(1, 2, lambda: training(batch_size=6, start=3)), 4), whole[3:])


BROKEN = (2, 11, 12)


@pytest.fixture
def warnings(caplog):
    """What was reported, line by line."""
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("options", [{}, {"threads": 3}, {"workers": 2}])
def test_others_take_the_places_of_unreadable_examples(options, warnings):
    batches = training(COUNT, source=Images(BROKEN), max_broken=0.2, **options)
    for broken, whole in zip(take(batches, 3), take(training(COUNT), 3), strict=True):
        readable = ~np.isin(whole["label"], BROKEN)
        for name in whole:
            np.testing.assert_array_equal(broken[name][readable], whole[name][readable])
        assert not np.isin(broken["label"], BROKEN).any()
    assert batches.broken == {*BROKEN}
    assert warnings() == [
        f"image {i} cannot be read, {n} of 23 examples so far." for n, i in enumerate(BROKEN, 1)
    ]  # once each, of three times


def test_substitutes_are_drawn_by_the_row():
    """So that they are the same on any number of threads and hosts, and in a run that goes on."""
    broken = Images(BROKEN)
    batches = take(training(COUNT, source=broken, max_broken=0.2), 6)
    assert_equal_batches(take(training(COUNT, source=broken, max_broken=0.2, start=2), 4), batches[2:])
    substitutes = {
        int(label)
        for batch, whole in zip(batches, take(training(COUNT), 6), strict=True)
        for label in batch["label"][np.isin(whole["label"], BROKEN)]
    }
    assert len(substitutes) > 6  # of 18 draws


@pytest.mark.parametrize("batch_size", [1, 5, 23, 30])
def test_unreadable_examples_are_masked_in_evaluation(batch_size, warnings):
    batches = evaluation(batch_size, source=Images(BROKEN), max_broken=0.2)
    whole = list(batches)
    mask = np.concatenate([batch["mask"] for batch in whole])
    assert labels(whole)[mask].tolist() == [i for i in range(COUNT) if i not in BROKEN]
    assert len(warnings()) == 3
    list(evaluation(batch_size, source=Images(BROKEN), max_broken=0.2, broken=batches.broken))
    assert len(warnings()) == 3  # those are known


def test_more_unreadable_examples_than_allowed_end_the_run():
    share = 2 / COUNT  # three are more
    assert len(take(training(COUNT, source=Images(BROKEN[:2]), max_broken=share), 2)) == 2
    message = r"^3 of 23 examples cannot be read, more than config.data.max_broken=0.08.* of them; one is image 2\.$"
    with pytest.raises(BrokenDataError, match=message):
        take(training(COUNT, source=Images(BROKEN), max_broken=share), 2)
    with pytest.raises(BrokenDataError, match=r"^3 of 23"):
        list(evaluation(source=Images(BROKEN), max_broken=share))


def test_nothing_readable_is_said_at_once():
    with pytest.raises(BrokenDataError, match="100 examples one after the other cannot be read, the last because: "):
        take(training(source=Images(range(COUNT)), max_broken=1.0), 1)


def test_other_errors_of_a_source_are_not_hidden():
    class Failing(Images):
        def __getitem__(self, index):
            raise KeyError("label")

    with pytest.raises(KeyError, match="label"):
        take(training(source=Failing()), 1)


GROUPS = np.random.default_rng(1).permutation(np.repeat([7, 2, 5], [13, 9, 1]))
MEMBERS = {group: np.flatnonzero(group == GROUPS) for group in (2, 5, 7)}
"""9, 1 and 13 of the images."""


def test_groups_fill_whole_batches():
    counted = {size: batches_per_epoch(SOURCE, size, GROUPS) for size in (1, 2, 4, 13, 30)}
    assert counted == {1: 23, 2: 7 + 5 + 1, 4: 4 + 3 + 1, 13: 3, 30: 3}
    assert [batches_per_epoch(SOURCE, size) for size in (1, 4, 30)] == [23, 5, 0]


@pytest.mark.parametrize("batch_size", [2, 6])
def test_training_batches_are_of_one_group(batch_size):
    for batch in take(training(batch_size, groups=GROUPS), 30):
        assert len({*GROUPS[batch["label"]]}) == 1
        assert len(batch["label"]) == batch_size


@pytest.mark.parametrize("batch_size", [1, 4, 30])
def test_every_epoch_has_every_example_of_every_group(batch_size):
    """And none once more than it takes to fill the group's batches."""
    count = batches_per_epoch(SOURCE, batch_size, GROUPS)
    batches = take(training(batch_size, groups=GROUPS), 3 * count)
    for epoch in range(3):
        times = np.bincount(labels(batches[epoch * count : (epoch + 1) * count]), minlength=COUNT)
        for members in MEMBERS.values():
            rows = int(np.ceil(len(members) / batch_size)) * batch_size
            assert times[members].sum() == rows
            assert {*times[members]} <= {rows // len(members), rows // len(members) + 1}


def test_every_epoch_has_its_own_batches_in_its_own_order():
    count = batches_per_epoch(SOURCE, 2, GROUPS)
    rows = labels(take(training(2, groups=GROUPS), 4 * count)).reshape(4, count, 2)
    assert len({tuple(GROUPS[epoch[:, 0]]) for epoch in rows}) == 4
    for group in (7, 2):  # and so which examples fill up differs
        assert len({tuple(epoch[GROUPS[epoch] == group]) for epoch in rows}) == 4
    twice = [tuple(np.flatnonzero(np.bincount(epoch.ravel()) == 2)) for epoch in rows]
    assert len({*twice}) > 1


@pytest.mark.parametrize("start", [1, 4, 17])
def test_batches_of_groups_are_a_function_of_their_number(start):
    whole = take(training(4, groups=GROUPS), start + 9)
    assert_equal_batches(take(training(4, groups=GROUPS, start=start), 9), whole[start:])


def test_other_seeds_give_other_batches_of_groups():
    one, other = (labels(take(training(4, groups=GROUPS, seed=seed), 8)) for seed in (3, 4))
    assert one.tolist() != other.tolist()


@pytest.mark.parametrize("options", [{"threads": 3}, {"workers": 2}])
def test_threads_and_workers_change_nothing_with_groups(options):
    assert_equal_batches(take(training(4, groups=GROUPS, **options), 9), take(training(4, groups=GROUPS), 9))


@pytest.mark.parametrize("processes", [2, 3])
def test_rows_of_all_processes_are_those_of_one_with_groups(on_process, processes):
    for batches in (
        lambda: take(training(6, groups=GROUPS), 10),
        lambda: list(evaluation(6, groups=GROUPS)),
    ):
        parts = [on_process(i, processes, batches) for i in range(processes)]
        assert_equal_batches(joined(parts), batches())


@pytest.mark.parametrize("batch_size", [1, 4, 6, 30])
def test_evaluation_has_every_example_once_group_by_group(batch_size):
    batches = list(evaluation(batch_size, groups=GROUPS))
    assert len(batches) == batches_per_epoch(SOURCE, batch_size, GROUPS)
    for batch in batches:
        assert len({*GROUPS[batch["label"]]}) == 1
        np.testing.assert_array_equal(batch["index"], batch["label"])
    mask = np.concatenate([batch["mask"] for batch in batches])
    assert labels(batches)[mask].tolist() == np.concatenate([*MEMBERS.values()]).tolist()


def test_one_group_is_evaluated_as_none():
    assert_equal_batches(list(evaluation(6, groups=np.ones(COUNT, int))), list(evaluation(6)))


def test_examples_of_the_same_group_take_the_places_of_unreadable_ones():
    options = {"groups": GROUPS, "max_broken": 0.2}
    broken = tuple(MEMBERS[7][[0, -1]])
    count = batches_per_epoch(SOURCE, 4, GROUPS)
    batches = take(training(4, source=Images(broken), **options), 2 * count)
    for batch, whole in zip(batches, take(training(4, groups=GROUPS), 2 * count), strict=True):
        np.testing.assert_array_equal(GROUPS[batch["label"]], GROUPS[whole["label"]])
        readable = ~np.isin(whole["label"], broken)
        np.testing.assert_array_equal(batch["label"][readable], whole["label"][readable])
        assert not np.isin(batch["label"], broken).any()
    found = list(evaluation(4, source=Images(broken), **options))
    assert all(len({*GROUPS[batch["label"]]}) == 1 for batch in found)
    mask = np.concatenate([batch["mask"] for batch in found])
    assert sorted(labels(found)[mask]) == [i for i in range(COUNT) if i not in broken]


def test_an_epoch_of_repeated_examples_has_as_many_batches_of_each_group():
    batches = take(training(4, groups=GROUPS, repeats=3), batches_per_epoch(SOURCE, 4, GROUPS))
    times = np.bincount(labels(batches), minlength=COUNT)
    assert {group: sorted(times[members])[-6:] for group, members in MEMBERS.items()} == {
        2: [0, 0, 3, 3, 3, 3],
        5: [4],
        7: [1, 3, 3, 3, 3, 3],
    }


def test_every_example_needs_a_group():
    with pytest.raises(ValueError, match=r"^groups must have a number for each of the 23 examples, got \(22,\)\.$"):
        training(4, groups=GROUPS[1:])
