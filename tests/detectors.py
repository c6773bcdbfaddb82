"""Small detectors, and those of torchvision's that the reference numbers are of, with what these were made from."""

import functools
import json

import jax
import jax.numpy as jnp
import modules
import numpy as np
from flax import nnx

from ssm_jax.detection import Objects, create_detector
from ssm_jax.detection.faster_rcnn import BoxBranch, ConvsLinear, TwoLinear
from ssm_jax.detection.fpn import FPN, P6P7
from ssm_jax.detection.mask_rcnn import MaskBranch
from ssm_jax.detection.rpn import RPN
from ssm_jax.layers.norm import BatchNorm
from ssm_jax.pretrained import load_torch
from ssm_jax.pretrained.save import torch_state

partial = functools.partial

NETWORK = {"name": "resnet50", "depths": (1, 1, 1, 1), "dims": (4, 8, 16, 32), "stem_width": 16}

NUMBERS = {"samples": 16, "positive_share": 0.25}
SMALL = {
    "retinanet": {"fpn": partial(FPN, out_channels=8, extra=P6P7), "candidates": 20, "detections": 10},
    "faster_rcnn": {
        "fpn": partial(FPN, out_channels=8),
        "rpn": partial(
            RPN,
            anchor_sizes=((8,), (16,), (32,), (64,), (128,)),
            candidates=20,
            proposals=20,
            train_candidates=30,
            train_proposals=30,
            **NUMBERS,
        ),
        "box": partial(BoxBranch, head=partial(TwoLinear, features=16), detections=10, **NUMBERS),
    },
}
SMALL["mask_rcnn"] = SMALL["faster_rcnn"] | {"mask": partial(MaskBranch, widths=(8,), width=8)}


def small(name, *, num_classes=3, backbone=NETWORK, seed=0, **overrides):
    """A detector with drawn parameters, whose outputs are of the order of 1."""
    arguments = SMALL[name] | overrides
    detector = modules.drawn(
        lambda: create_detector(name, backbone=backbone, num_classes=num_classes, **arguments, rngs=nnx.Rngs(0)), seed
    )
    for path, variable in nnx.to_flat_state(nnx.state(detector)):
        if path[-1] == "var":
            variable[...] = jnp.square(variable[...]) + 0.5
        elif path[-1] == "kernel":
            variable[...] *= (variable.size / variable.shape[-1]) ** -0.5
        if path[-2] == "deltas":
            variable[...] *= 0.2  # or boxes are far from images
    return detector


def batch(b=2, *, side=64, n=4, num_classes=3, masks=False, seed=0):
    """Noise as images of different sizes, and 0 to `n` objects in each."""
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(b, side, side, 3)).astype(np.float32)
    sizes = rng.integers(side // 2, side + 1, (b, 2)).astype(np.int32)
    corners = np.sort(rng.uniform(0, 1, (b, n, 2, 2)), axis=2) * sizes[:, None, None, ::-1]
    boxes = corners.reshape(b, n, 4).astype(np.float32) + np.float32([0, 0, 3, 3])
    classes = rng.integers(0, num_classes, (b, n)).astype(np.int32)
    valid = np.arange(n)[None] < rng.integers(1, n + 1, b)[:, None]
    grids = (rng.integers(0, 2, (b, n, 28, 28)).astype(np.uint8), boxes) if masks else ()
    return jnp.asarray(images), jnp.asarray(sizes), Objects(*map(jnp.asarray, (boxes, classes, valid, *grids)))


def modes(detector):
    """It in training and in evaluation."""
    view = partial(nnx.view, detector, raise_if_not_found=False)
    return view(deterministic=False, use_running_average=False), view(deterministic=True, use_running_average=True)


def called(function, module, *arguments):
    """`function(module, *arguments)`, compiled."""
    graphdef, state = nnx.split(module)
    return jax.jit(lambda state, *arguments: function(nnx.merge(graphdef, state, copy=True), *arguments))(
        state, *arguments
    )


def detect(detector, images, sizes):
    """Detections."""
    return called(lambda detector, *arguments: detector(*arguments), modes(detector)[1], images, sizes)


def loss_of(detector):
    """The losses and their gradients as a function of parameters, the batch and a key; and the parameters.

    It gives (the sum, (losses, other variables after)), gradients.
    """
    graphdef, params, rest = nnx.split(modes(detector)[0], nnx.Param, ...)

    def loss(params, images, sizes, objects, key):
        model = nnx.merge(graphdef, params, rest, copy=True)
        losses = model.losses(images, sizes, objects, key=key)
        return sum(losses.values()), (losses, nnx.state(model, nnx.Not(nnx.Param)))

    return jax.value_and_grad(loss, has_aux=True), params


def losses(detector, *inputs, key=0):
    """Losses, gradients and other variables after."""
    loss, params = loss_of(detector)
    (_, (values, rest)), gradients = jax.jit(loss)(params, *inputs, jax.random.key(key))
    return values, gradients, rest


def channels_last(x):
    """Of a map."""
    return np.moveaxis(np.asarray(x), 1, -1)


def arguments(name, k):
    """Those of the detector of a golden file that was made with `k`."""
    if name == "retinanet":
        return {
            "fpn": partial(FPN, out_channels=k["out_channels"], extra=P6P7),
            "anchor_sizes": k["anchor_sizes"],
            "match_iou": k["fg_iou_thresh"],
            "ignore_iou": k["bg_iou_thresh"],
            "candidates": k["topk_candidates"],
            "score_threshold": k["score_thresh"],
            "nms_iou": k["nms_thresh"],
            "detections": k["detections_per_img"],
        }
    norm = BatchNorm if k.get("fpn_norm") else None
    features = k["representation_size"]
    convs = partial(ConvsLinear, widths=(16, 16), features=features, norm=norm)
    mask = partial(MaskBranch, widths=k.get("mask_layers", ()), width=k.get("mask_dim_reduced", 0))
    return {
        "fpn": partial(FPN, out_channels=k["out_channels"], norm=norm),
        "rpn": partial(
            RPN,
            depth=k.get("rpn_conv_depth", 1),
            anchor_sizes=k["anchor_sizes"],
            match_iou=k["rpn_fg_iou_thresh"],
            ignore_iou=k["rpn_bg_iou_thresh"],
            samples=16368,  # all anchors
            positive_share=1.0,
            nms_iou=k["rpn_nms_thresh"],
            score_threshold=k["rpn_score_thresh"],
            candidates=k["rpn_pre_nms_top_n_test"],
            proposals=k["rpn_post_nms_top_n_test"],
            train_candidates=k["rpn_pre_nms_top_n_train"],
            train_proposals=k["rpn_post_nms_top_n_train"],
        ),
        "box": partial(
            BoxBranch,
            head=convs if norm else partial(TwoLinear, features=features),
            match_iou=k["box_fg_iou_thresh"],
            ignore_iou=k["box_bg_iou_thresh"],
            samples=128,  # all proposals
            positive_share=1.0,
            weights=tuple(map(float, k["bbox_reg_weights"])),
            score_threshold=k["box_score_thresh"],
            nms_iou=k["box_nms_thresh"],
            detections=k["box_detections_per_img"],
        ),
        "mask": mask if "mask_layers" in k else None,
    }


KINDS = {"retinanet": "retinanet", "fasterrcnn_v2": "faster_rcnn", "maskrcnn": "mask_rcnn"}


class Golden:
    """One of torchvision's detectors: ours with its weights, what it says, and of what."""

    def __init__(self, shared, name):
        with np.load(shared / f"golden/torchvision/{name}.npz") as file:
            self.arrays = dict(file)
        with np.load(shared / "golden/torchvision/images_targets.npz") as file:
            images = dict(file)
        self.meta = json.loads(str(self.arrays.pop("meta")))
        kwargs = self.meta["kwargs"]
        self.background = int(name != "retinanet")
        self.images = jnp.asarray(channels_last(images["images_batched"]))
        self.sizes = jnp.asarray(images["image_sizes"], jnp.int32)
        self.objects = self._objects(images)
        backbone = NETWORK | {"norm_eval": kwargs["body_norm"].startswith("Frozen")}
        num_classes = kwargs["num_classes"] - self.background
        self.detector = nnx.eval_shape(
            lambda: create_detector(
                KINDS[name], backbone=backbone, num_classes=num_classes, **arguments(name, kwargs), rngs=nnx.Rngs(0)
            )
        )
        load_torch(self.detector, self.some("param/"))

    def some(self, prefix):
        """Arrays whose names begin with `prefix`, by the rest of their names."""
        return {name.removeprefix(prefix): x for name, x in self.arrays.items() if name.startswith(prefix)}

    def _objects(self, images):
        """With two and five in the images: padded, with nonsense."""
        padded = []
        for i, (height, width) in enumerate(images["image_sizes"]):
            told = {key: images[f"resized_target/{i}/{key}"] for key in ("boxes", "labels", "masks_bits")}
            n = len(told["boxes"])
            masks = np.zeros((5, *self.images.shape[1:3]), np.uint8)
            masks[:n, :height, :width] = np.unpackbits(told["masks_bits"], axis=-1, count=width)
            boxes, classes = np.full((5, 4), np.nan, np.float32), np.full(5, 99, np.int32)
            boxes[:n], classes[:n] = told["boxes"], told["labels"] - self.background
            padded.append((boxes, classes, np.arange(5) < n, masks))
        boxes, classes, valid, masks = map(np.stack, zip(*padded, strict=True))
        whole = np.broadcast_to(np.float32([0, 0, *masks.shape[:1:-1]]), boxes.shape)
        return Objects(*map(jnp.asarray, (boxes, classes, valid, masks, whole)))

    @functools.cached_property
    def detections(self):
        """Ours."""
        return jax.tree.map(np.asarray, detect(self.detector, self.images, self.sizes))

    @functools.cached_property
    def training(self):
        """Our losses, gradients and other variables after, by torchvision's names."""
        return losses(self.detector, self.images, self.sizes, self.objects)

    def assert_losses(self):
        """That ours are torchvision's."""
        ours, expected = self.training[0], self.some("loss/")
        assert ours.keys() == expected.keys()
        for name, loss in expected.items():
            np.testing.assert_allclose(ours[name], loss, rtol=1e-4, err_msg=name)

    def assert_gradients(self, absolute=None):
        """Likewise, to a part of each one's largest number or to within an `absolute` difference."""
        state = nnx.to_flat_state(self.training[1])
        ours = torch_state(self.detector, {path: variable[...] for path, variable in state})
        expected = self.some("grad/")
        assert len(expected) > 20
        for name, gradient in expected.items():
            tolerance = absolute or 1e-3 * np.abs(gradient).max()
            np.testing.assert_allclose(ours[name], gradient, rtol=0, atol=tolerance, err_msg=name)
        for name, norm in self.some("gradnorm/param/").items():
            tolerance = {"rtol": 1e-3} if absolute is None else {"rtol": 0, "atol": absolute}
            np.testing.assert_allclose(np.linalg.norm(ours[name]), norm, err_msg=name, **tolerance)

    def assert_detections(self):
        """That ours are torchvision's: which ones, in which order, and where."""
        for i in range(2):
            boxes, scores, classes, valid = (x[i] for x in self.detections[:4])
            expected = self.some(f"det_resized/{i}/")
            n = len(expected["labels"])
            np.testing.assert_array_equal(valid, np.arange(len(valid)) < n)
            np.testing.assert_array_equal(classes[:n], expected["labels"] - self.background)
            np.testing.assert_allclose(boxes[:n], expected["boxes"], rtol=0, atol=1e-2)
            np.testing.assert_allclose(scores[:n], expected["scores"], rtol=0, atol=1e-4)
            assert not scores[n:].any()


def assert_same_rows(ours, expected, atol):
    """As many rows, each in any order, every one of which has an equal one."""
    assert ours.shape == expected.shape
    distance = np.abs(ours[:, None] - expected[None]).max(-1)
    for axis in (0, 1):
        assert distance.min(axis).max() < atol
