import numpy as np
import pytest

from ssm_jax.training.scores import grouped_accuracy, mean_scores


def rows(count=7, classes=4):
    rng = np.random.default_rng(0)
    return {
        "loss": rng.random(count).astype(np.float32),
        "logits": rng.normal(size=(count, classes)).astype(np.float32),
        "label": rng.integers(0, classes, count).astype(np.int32),
        "mask": np.array([True, True, False, True, True, True, False])[:count],
    }


def test_scores_are_means_over_the_rows_that_could_be_read():
    some = rows()
    scores = mean_scores(some)
    assert scores.keys() == {"loss"}
    assert scores["loss"] == pytest.approx(some["loss"][[0, 1, 3, 4, 5]].astype(float).mean(), rel=1e-12)


def test_a_share_of_a_million_rows_is_exact():
    right = (np.arange(1_000_003) % 3 == 0).astype(np.float32)
    some = {"accuracy": right, "mask": np.ones(len(right), bool), "logits": right[:, None], "label": right}
    assert mean_scores(some)["accuracy"] == 333_335 / 1_000_003


def test_clips_of_a_video_are_averaged_before_a_class_is_named():
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [0.0, 0.5], [1.0, 0.0], [0.0, 3.0]])
    groups = np.array([4, 4, 4, 9, 9])
    assert grouped_accuracy(logits, np.array([0, 0, 0, 1, 1]), groups) == 1.0
    assert grouped_accuracy(logits, np.array([0, 0, 0, 0, 0]), groups) == 0.5
    assert grouped_accuracy(logits[:3], np.array([1, 1, 1]), groups[:3]) == 0.0


def test_clips_that_could_not_be_read_are_left_out_of_their_video():
    some = rows(5, 2) | {
        "logits": np.array([[1.0, 0.0], [0.0, 0.5], [0.0, 9.0], [0.0, 1.0], [0.0, 1.0]]),
        "label": np.array([0, 0, 0, 1, 1]),
    }
    assert mean_scores(some, groups=np.array([0, 0, 0, 1, 1]))["video_accuracy"] == 1.0


def test_average_precision_is_the_area_under_precision_over_recall():
    """Of 3 rows with the attribute, ranked 1st, 2nd and 4th of 5: the mean of precisions 1, 1 and 3/4."""
    logits = np.array([[5.0, 0.0], [4.0, 0.0], [3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    labels = np.array([[1, 0], [1, 0], [0, 0], [1, 0], [0, 0]], np.float32)  # nobody has the second
    some = {"logits": logits, "label": labels, "mask": np.ones(5, bool)}
    assert mean_scores(some, multi_label=True)["mean_average_precision"] == pytest.approx((1 + 1 + 3 / 4) / 3)
