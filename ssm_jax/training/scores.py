"""From the rows of an evaluation, on the host, to the numbers of a table."""

import re
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int


def is_detail(name: str) -> bool:
    """Whether a score is one of many that say more about another: COCO's recalls, and those by size of the objects."""
    return re.search(r"AR_|_(small|medium|large)$", name) is not None


def mean_scores(
    rows: Mapping[str, np.ndarray], *, groups: Int[np.ndarray, "n"] | None = None, multi_label: bool = False
) -> dict[str, float]:
    """Means over the rows with a true `mask`, in float64, and what takes all of them together.

    Args:
        rows: what an evaluation step returns, of all examples: scores (n,), `logits` (n, classes), `label`, `mask`.
        groups: number of the video that each row is a clip of: `video_accuracy` is that of their mean logits.
        multi_label: whether a label is 0 or 1 for each class: `mean_average_precision` is over the classes that any
            row has.
    """
    mask = rows["mask"]
    kept = {name: values[mask] for name, values in rows.items() if name != "mask"}
    logits, labels = kept.pop("logits"), kept.pop("label")
    scores = {name: float(values.mean(dtype=np.float64)) for name, values in kept.items()}
    if groups is not None:
        scores["video_accuracy"] = grouped_accuracy(logits, labels, groups[mask])
    if multi_label:
        from sklearn.metrics import average_precision_score

        present = labels.any(0)
        scores["mean_average_precision"] = float(average_precision_score(labels[:, present], logits[:, present]))
    return scores


def grouped_accuracy(
    logits: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, "n"], groups: Int[np.ndarray, "n"]
) -> float:
    """Share of the groups whose mean logits are largest for their label, which rows of a group share."""
    _, first, member = np.unique(groups, return_index=True, return_inverse=True)
    sums = np.zeros((len(first), logits.shape[1]))
    np.add.at(sums, member, logits)
    return float(np.mean(sums.argmax(-1) == labels[first]))
