import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssm_jax.detection import nms as module
from ssm_jax.detection.nms import all_at_once, nms, one_by_one
from ssm_jax.ops.backend import traced_for


@pytest.fixture(params=[one_by_one, all_at_once])
def way(request, monkeypatch):
    """Both ways, each as the only one."""
    for name in ("one_by_one", "all_at_once"):
        monkeypatch.setattr(module, name, request.param)
    jax.clear_caches()
    return request.param


_compiled = jax.jit(nms, static_argnames=("threshold", "max_kept"))


def brute_force(boxes, scores, threshold, valid=None, classes=None):
    """Indices that stay, by the definition, in float32 as the arrays are."""
    n = len(boxes)
    valid = np.ones(n, bool) if valid is None else valid
    classes = np.zeros(n, int) if classes is None else classes
    order = sorted(np.flatnonzero(valid), key=lambda i: (-np.inf if np.isnan(scores[i]) else scores[i]) * -1)
    stay = []
    with np.errstate(all="ignore"):
        for i in order:
            for j in stay:
                (ax, ay, ar, ab), (bx, by, br, bb) = boxes[j], boxes[i]
                common = max(min(ar, br) - max(ax, bx), np.float32(0)) * max(min(ab, bb) - max(ay, by), np.float32(0))
                ratio = common / ((ar - ax) * (ab - ay) + (br - bx) * (bb - by) - common)
                if classes[i] == classes[j] and ratio > np.float32(threshold):
                    break
            else:
                stay.append(i)
    return stay


def check(expected, found, max_kept):
    indices, kept = map(np.asarray, found)
    assert indices.shape == kept.shape == (max_kept,)
    expected = list(expected)[:max_kept]
    np.testing.assert_array_equal(kept, np.arange(max_kept) < len(expected))
    np.testing.assert_array_equal(indices[kept], expected)


def test_torchvisions_cases(shared, way):
    golden = np.load(shared / "golden/torchvision/unit_nms.npz")
    cases = json.loads(str(golden["meta"]))["cases"]
    assert len(cases) == 21
    compiled = jax.jit(functools.partial(nms, max_kept=200), static_argnames="threshold")
    for name, case in cases.items():
        boxes, scores = golden[f"{name}/boxes"], golden[f"{name}/scores"]
        padding = 200 - len(boxes)  # copies of the last box, with a higher score
        boxes = np.pad(boxes, ((0, padding), (0, 0)), mode="edge") if len(boxes) else np.ones((200, 4), np.float32)
        classes = np.pad(golden[f"{name}/idxs"] if name.startswith("batched") else 0 * scores.astype(int), (0, padding))
        found = compiled(
            jnp.asarray(boxes),
            jnp.asarray(np.pad(scores, (0, padding), constant_values=9)),
            threshold=case["iou_threshold"],
            valid=jnp.arange(200) < len(scores),
            classes=jnp.asarray(classes, jnp.int32),
        )
        check(golden[f"{name}/keep"], found, 200)


def random_case(seed, n, *, whole):
    """Boxes and scores, few distinct ones if `whole`, some of which are empty, inverted or not numbers."""
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.uniform(0, 6, (n, 2, 2)), axis=1)
    scores = rng.normal(size=n)
    if whole:
        corners, scores = corners.round(), scores.round()
    boxes = corners.reshape(n, 4).astype(np.float32)
    boxes[rng.random(n) < 0.05] = np.nan
    inverted = rng.random(n) < 0.05
    boxes[inverted] = boxes[inverted][:, [2, 1, 0, 3]]
    scores = scores.astype(np.float32)
    scores[rng.random(n) < 0.05] = np.nan
    scores[rng.random(n) < 0.05] = -np.inf
    return boxes, scores, rng.random(n) < 0.8, rng.integers(0, 3, n)


@pytest.mark.parametrize("max_kept", [5, 60])
@given(st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_both_ways_do_what_the_definition_says(max_kept, seed, whole, threshold, divided):
    boxes, scores, valid, classes = random_case(seed, 60, whole=whole)
    classes = classes if divided else None
    expected = brute_force(boxes, scores, threshold, valid, classes)
    for backend in ("cpu", "gpu"):
        with traced_for(backend):
            found = _compiled(
                jnp.asarray(boxes),
                jnp.asarray(scores),
                threshold=threshold,
                valid=jnp.asarray(valid),
                classes=jnp.asarray(classes) if divided else None,
                max_kept=max_kept,
            )
        check(expected, found, max_kept)


def test_of_a_chain_every_other_box_stays(way):
    """All boxes at once must be iterated as many times as the chain is long."""
    n = 64
    left = jnp.arange(n, dtype=jnp.float32)
    boxes = jnp.stack([left, left * 0, left + 2, left * 0 + 1], axis=-1)  # neighbours have IoU 1/3
    check(range(0, n, 2), nms(boxes, -left, threshold=0.3, max_kept=n), n)
    check(range(n - 1, 0, -2), nms(boxes, left, threshold=0.3, max_kept=n), n)


def test_the_threshold_itself_suppresses_nothing(way):
    boxes = jnp.array([[0.0, 0, 2, 1], [0, 0, 1, 1]])  # IoU 1/2
    scores = jnp.array([1.0, 0.0])
    check([0, 1], nms(boxes, scores, threshold=0.5, max_kept=2), 2)
    check([0], nms(boxes, scores, threshold=0.499, max_kept=2), 2)


def test_classes_are_told_apart_however_far_boxes_reach(way):
    """Offsets per class, which torchvision adds to the boxes, round boxes of millions of pixels."""
    boxes = jnp.array([[0.0, 0, 1, 1], [0, 0, 1, 1], [1e8, 1e8, 2e8, 2e8], [0, 0, 1, 1]])
    found = nms(boxes, jnp.array([4.0, 3, 2, 1]), threshold=0.5, classes=jnp.array([0, 2**30, 1, 0]), max_kept=4)
    check([0, 1, 2], found, 4)


@pytest.mark.parametrize("n", [0, 5])
def test_without_boxes_none_is_kept(way, n):
    indices, kept = nms(jnp.zeros((n, 4)), jnp.zeros(n), threshold=0.5, valid=jnp.zeros(n, bool), max_kept=3)
    assert indices.shape == (3,)
    assert not kept.any()


def test_images_are_independent_under_vmap(way):
    cases = [random_case(seed, 40, whole=True)[:3] for seed in range(3)]
    cases[1] = (*cases[1][:2], np.zeros(40, bool))
    boxes, scores, valid = (jnp.asarray(np.stack(part)) for part in zip(*cases, strict=True))
    found = jax.jit(jax.vmap(lambda b, s, v: nms(b, s, threshold=0.3, valid=v, max_kept=12)))(boxes, scores, valid)
    for i, case in enumerate(cases):
        check(brute_force(*case[:2], 0.3, case[2]), [part[i] for part in found], 12)


def test_images_of_a_batch_stay_on_their_devices(way, mesh):
    from ssm_jax.ops.batch_local import batch_local

    boxes, scores = (
        jnp.asarray(np.stack(part))
        for part in zip(*(random_case(seed, 40, whole=False)[:2] for seed in range(8)), strict=True)
    )
    every = jax.vmap(functools.partial(nms, threshold=0.3, max_kept=12))
    divided = jax.jit(lambda *x: batch_local(lambda x: every(*x))(x))
    jax.tree.map(np.testing.assert_array_equal, divided(boxes, scores), jax.jit(every)(boxes, scores))


def test_there_is_no_gradient(way):
    def best(boxes, scores):
        indices, kept = nms(boxes, scores, threshold=0.5, max_kept=2)
        return jnp.where(kept, scores[indices], 0).sum()

    boxes, scores = jnp.array([[0.0, 0, 2, 2], [0, 0, 2, 1.9], [4, 4, 5, 5]]), jnp.array([0.3, 0.2, 0.1])
    of_boxes, of_scores = jax.grad(best, argnums=(0, 1))(boxes, scores)
    assert not of_boxes.any()
    np.testing.assert_array_equal(of_scores, [1, 0, 1])


def test_many_boxes_take_no_matrix():
    n = 10_000
    arguments = jnp.zeros((n, 4)), jnp.zeros(n), jnp.zeros(n, jnp.int32)
    f = jax.jit(lambda boxes, scores, classes: nms(boxes, scores, threshold=0.5, classes=classes, max_kept=100))
    for backend in ("cpu", "gpu"):
        with traced_for(backend):
            memory = f.lower(*arguments).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 100 * n
