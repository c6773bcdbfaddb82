"""What our variables are called in the state dicts of timm, torchvision, the original repositories and S4's release."""

import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

from flax import nnx

from ssm_jax.detection import Backbone
from ssm_jax.layers.s4nd import S4ND

Path = tuple[Any, ...]
"""Where a variable is in a network: names of attributes, and numbers in lists."""

_Rules = Sequence[tuple[str, str | Callable[[re.Match], str]]]
"""Regular expressions and what to put in their place, one after another."""

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def _plus(text: str, add: int, factor: int = 1) -> Callable[[re.Match], str]:
    """`text` with another number for {}: factor n + add, n being the first that was matched."""
    return lambda match: match.expand(text.format(factor * int(match[1]) + add))


_RENAMES: dict[str, _Rules] = {
    "ConvNeXt": [
        (r"\.blocks\.(\d+)\.mixer\.conv\.", r".blocks.\1.conv_dw."),
        (r"^stem\.conv\.", "stem.0."),
        (r"^stem\.norm\.", "stem.1."),
        (r"^downsamples\.(\d+)\.norm\.", _plus("stages.{}.downsample.0.", 1)),
        (r"^downsamples\.(\d+)\.conv\.", _plus("stages.{}.downsample.1.", 1)),
        (r"^norm\.", "head.norm."),
        (r"^head\.(weight|bias)", r"head.fc.\1"),
    ],
    "VisionTransformer": [
        (r"^patch_embed\.", "patch_embed.proj."),
        (r"^blocks\.blocks\.(\d+)\.", r"blocks.\1."),
        (r"\.mixer\.", ".attn."),
    ],
    "ResNet": [
        (r"^stages\.(\d+)\.blocks\.", _plus("layer{}.", 1)),
        (r"(conv1|downsample)\.layers\.", r"\1."),
        (r"\.spatial\.(conv|bn)\.", r".spatial.conv.\1."),
        (r"^head\.", "fc."),
    ],
    "SwinTransformer": [
        (r"^stages\.(\d+)\.blocks\.", r"layers.\1.blocks."),
        (r"^downsamples\.(\d+)\.", _plus("layers.{}.downsample.", 1)),
        (r"^head\.", "head.fc."),
    ],
    "PVTv2": [
        (r"^downsamples\.0\.", "patch_embed."),
        (r"^downsamples\.(\d+)\.", r"stages.\1.downsample."),
        (r"^norms\.(\d+)\.", r"stages.\1.norm."),
    ],
}
"""From our names to timm's, by class."""

_FROM_TIMM: dict[str, dict[str, _Rules]] = {
    "ConvNeXt": {
        "torchvision": [
            (r"^stem\.", "features.0."),
            (r"^stages\.(\d+)\.downsample\.", _plus("features.{}.", 0, 2)),
            (r"^stages\.(\d+)\.blocks\.(\d+)\.", _plus(r"features.{}.\2.", 1, 2)),
            (r"\.conv_dw\.", ".block.0."),
            (r"^(features\.\d+\.\d+)\.norm\.", r"\1.block.2."),
            (r"\.mlp\.fc1\.", ".block.3."),
            (r"\.mlp\.fc2\.", ".block.5."),
            (r"\.gamma$", ".layer_scale"),
            (r"^head\.norm\.", "classifier.0."),
            (r"^head\.fc\.", "classifier.2."),
        ],
        "ConvNeXt's authors": [
            (r"^stem\.", "downsample_layers.0."),
            (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
            (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
            (r"\.conv_dw\.", ".dwconv."),
            (r"\.mlp\.fc", ".pwconv"),
            (r"^head\.norm\.", "norm."),
            (r"^head\.fc\.", "head."),
        ],
    },
    "VisionTransformer": {
        "torchvision": [
            (r"^cls_token$", "class_token"),
            (r"^pos_embed$", "encoder.pos_embedding"),
            (r"^patch_embed\.proj\.", "conv_proj."),
            (r"^blocks\.", "encoder.layers.encoder_layer_"),
            (r"\.norm(\d)\.", r".ln_\1."),
            (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
            (r"\.attn\.proj\.", ".self_attention.out_proj."),
            (r"\.mlp\.fc1\.", ".mlp.0."),
            (r"\.mlp\.fc2\.", ".mlp.3."),
            (r"^norm\.", "encoder.ln."),
            (r"^head\.", "heads.head."),
        ],
    },
    "SwinTransformer": {
        "torchvision": [
            (r"^patch_embed\.proj\.", "features.0.0."),
            (r"^patch_embed\.norm\.", "features.0.2."),
            (r"^layers\.(\d+)\.downsample\.", _plus("features.{}.", 0, 2)),
            (r"^layers\.(\d+)\.blocks\.", _plus("features.{}.", 1, 2)),
            (r"\.mlp\.fc1\.", ".mlp.0."),
            (r"\.mlp\.fc2\.", ".mlp.3."),
            (r"^head\.fc\.", "head."),
        ],
        "Swin's authors": [
            (r"^layers\.(\d+)\.downsample\.", _plus("layers.{}.downsample.", -1)),  # at the end of a stage
            (r"^head\.fc\.", "head."),
        ],
    },
    "PVTv2": {
        "PVT's authors": [
            (r"^patch_embed\.", "patch_embed1."),
            (r"^stages\.(\d+)\.downsample\.", _plus("patch_embed{}.", 1)),
            (r"^stages\.(\d+)\.blocks\.", _plus("block{}.", 1)),
            (r"^stages\.(\d+)\.norm\.", _plus("norm{}.", 1)),
            (r"\.dwconv\.", ".dwconv.dwconv."),
        ],
    },
}
"""From timm's names to others. torchvision's ResNet has timm's, and so has DeiT."""

_RELEASE: dict[str, _Rules] = {
    "ConvNeXt": [
        (r"\.blocks\.(\d+)\.mixer\.", r".blocks.\1.conv_dw."),
        (r"^downsamples\.(\d+)\.norm\.", _plus("stages.{}.norm_layer.", 1)),
        (r"^downsamples\.(\d+)\.conv\.", _plus("stages.{}.downsample.conv.", 1)),
        (r"^downsamples\.(\d+)\.pooled\.mixer\.", _plus("stages.{}.downsample.s4conv.", 1)),
        (r"^downsamples\.(\d+)\.pooled\.fc\.", _plus("stages.{}.downsample.fc.", 1)),
        (r"^norm\.", "head.norm."),
        (r"^head\.(weight|bias)", r"head.fc.\1"),
        (r"\.space\.(weight|bias)$", r".\1"),  # of factorised convolutions
        (r"\.time$", ".time_weight"),
    ],
    "Isotropic": [
        (r"^blocks\.(\d+)\.norm\.", r"model.layers.\1.norm.norm."),
        (r"^blocks\.(\d+)\.mixer\.", r"model.layers.\1.layer."),
        (r"^norm\.", "model.norm.norm."),
        (r"^head\.", "decoder.output_transform."),
    ],
    "VisionTransformer": [
        (r"^patch_embed\.", "patch_embed.proj."),
        (r"^blocks\.blocks\.(\d+)\.norm1\.", _plus("blocks.{}.norm.norm.", 0, 2)),
        (r"^blocks\.blocks\.(\d+)\.mixer\.", _plus("blocks.{}.layer.", 0, 2)),
        (r"^blocks\.blocks\.(\d+)\.norm2\.", _plus("blocks.{}.norm.norm.", 1, 2)),
        (r"^blocks\.blocks\.(\d+)\.mlp\.fc1\.", _plus("blocks.{}.layer.ff.0.0.", 1, 2)),
        (r"^blocks\.blocks\.(\d+)\.mlp\.fc2\.", _plus("blocks.{}.layer.ff.2.", 1, 2)),
        (r"^norm\.", "norm.norm."),
    ],
}
"""From our names to those of S4's release, but for what is within S4ND layers and ConvNeXt's stems."""

_DOWNSAMPLE: _Rules = [
    (r"^stem\.downsample\.norm\.", "stages.0.norm_layer."),
    (r"^stem\.downsample\.conv\.", "stages.0.downsample.conv."),
    (r"^stem\.downsample\.pooled\.mixer\.", "stages.0.downsample.s4conv."),
    (r"^stem\.downsample\.pooled\.fc\.", "stages.0.downsample.fc."),
]

_RELEASE_STEMS: list[tuple[str, tuple[str, ...], _Rules]] = [
    ("patch", ("stem.conv.",), [(r"^stem\.conv\.", "stem.stem.0."), (r"^stem\.norm\.", "stem.stem.1.")]),
    (
        "depthwise_patch",
        ("stem.project.", "stem.pooled.mixer.conv."),
        [
            (r"^stem\.project\.", "stem.stem.0."),
            (r"^stem\.pooled\.mixer\.conv\.", "stem.stem.1."),
            (r"^stem\.pooled\.fc\.", "stem.stem.3."),
            (r"^stem\.norm\.", "stem.stem.5."),
        ],
    ),
    (
        "new_patch",
        ("stem.pooled.mixer.conv.",),
        [
            (r"^stem\.pooled\.mixer\.conv\.", "stem.stem.0."),
            (r"^stem\.pooled\.fc\.", "stem.stem.2."),
            (r"^stem\.norm\.", "stem.stem.4."),
        ],
    ),
    (
        "s4nd_patch",
        ("stem.project.", "stem.pooled."),
        [
            (r"^stem\.project\.", "stem.pre_stem."),
            (r"^stem\.pooled\.mixer\.", "stem.stem.s4conv."),
            (r"^stem\.pooled\.fc\.", "stem.stem.fc."),
            (r"^stem\.norm\.", "stem.post_stem."),
        ],
    ),
    (
        "new_s4nd_patch",
        ("stem.pooled.",),
        [
            (r"^stem\.pooled\.mixer\.", "stem.stem."),
            (r"^stem\.pooled\.fc\.", "stem.post_stem.1."),
            (r"^stem\.norm\.", "stem.post_stem.3."),
        ],
    ),
    (
        "s4nd",
        ("stem.body.mixer.",),
        [
            (r"^stem\.project\.", "stem.pre_stem.0."),
            (r"^stem\.norm\.", "stem.pre_stem.1."),
            (r"^stem\.body\.mixer\.", "stem.stem.s4conv."),
            (r"^stem\.body\.fc\.", "stem.stem.fc."),
            *_DOWNSAMPLE,
        ],
    ),
    (
        "default",
        ("stem.body.",),
        [
            (r"^stem\.project\.", "stem.stem.0."),
            (r"^stem\.norm\.", "stem.stem.1."),
            (r"^stem\.body\.conv\.", "stem.stem.3."),
            *_DOWNSAMPLE,
        ],
    ),
]
"""Those of ConvNeXt's stems there, by what some of our names begin with: the first stem that has all of it counts."""


_DETECTORS: _Rules = [
    (r"^fpn\.(inner|layer)s?\.(\d+)\.", r"fpn.\1_blocks.\2."),
    (r"^fpn\.extra\.", "fpn.extra_blocks."),
    (r"^fpn\.", "backbone.fpn."),
    (r"^rpn\.convs\.", "rpn.head.conv."),
    (r"^rpn\.objectness\.", "rpn.head.cls_logits."),
    (r"^rpn\.deltas\.", "rpn.head.bbox_pred."),
    (r"^box\.head\.(convs\.)?", "roi_heads.box_head."),
    (r"^box\.classes\.", "roi_heads.box_predictor.cls_score."),
    (r"^box\.deltas\.", "roi_heads.box_predictor.bbox_pred."),
    (r"^mask\.convs\.", "roi_heads.mask_head."),
    (r"^mask\.doubled\.", "roi_heads.mask_predictor.conv5_mask."),
    (r"^mask\.output\.", "roi_heads.mask_predictor.mask_fcn_logits."),
    (r"^classifier\.convs\.", "head.classification_head.conv."),
    (r"^classifier\.output\.", "head.classification_head.cls_logits."),
    (r"^regressor\.convs\.", "head.regression_head.conv."),
    (r"^regressor\.output\.", "head.regression_head.bbox_reg."),
    (r"\.(\d+)\.conv\.", r".\1.0."),
    (r"\.(\d+)\.norm\.", r".\1.1."),
]
"""From our names to torchvision's, of what a detector has besides the network."""

_OLDER_DETECTORS: _Rules = [
    (r"(inner_blocks|layer_blocks)\.(\d+)\.0\.", r"\1.\2."),
    (r"^rpn\.head\.conv\.0\.0\.", "rpn.head.conv."),
    (r"^roi_heads\.mask_head\.(\d+)\.0\.", _plus("roi_heads.mask_head.mask_fcn{}.", 1)),
    (r"_head\.conv\.(\d+)\.0\.", _plus("_head.conv.{}.", 0, 2)),
]
"""From these to those of the files that were released first."""


def dialects(model: nnx.Module, paths: Collection[Path]) -> dict[str, dict[Path, str]]:
    """For each way of naming, the names of a network's variables; first the one of the network's origin."""
    backbone = getattr(model, "backbone", None)
    if isinstance(backbone, Backbone):
        return _of_detector(backbone.network, paths)
    layers = {path for path, module in nnx.iter_modules(model) if isinstance(module, S4ND)}
    family = type(model).__name__
    ours = {path: _own_name(path, layers) for path in paths}
    timm = {"timm": _renamed(ours, _RENAMES.get(family, ()))}
    others = {name: _renamed(timm["timm"], rules) for name, rules in _FROM_TIMM.get(family, {}).items()}
    release = {}
    if layers or family in _RELEASE:
        names = _renamed(ours, _RELEASE.get(family, _RENAMES.get(family, ())))
        release["S4's release"] = _renamed(names, _release_stem(names.values()))
    return release | timm | others if layers or family not in _RENAMES else timm | others | release


def _of_detector(network: nnx.Module, paths: Collection[Path]) -> dict[str, dict[Path, str]]:
    """The same for a detector that sees by this network."""
    inside = ("backbone", "network")
    seeing = dialects(network, [path[2:] for path in paths if path[:2] == inside])
    ours = {path: _own_name(path, ()) for path in paths if path[:2] != inside}
    convs = {path[3] for path in ours if path[:3] == ("box", "head", "convs")}
    after_convs: _Rules = [(r"^box\.head\.fc\.", f"box.head.{len(convs) + 1}.")]  # one more is what flattens
    now = _renamed(ours, [*after_convs, *_DETECTORS])
    names = {}
    for release, others in {"torchvision": now, "torchvision's older files": _renamed(now, _OLDER_DETECTORS)}.items():
        for origin, seen in seeing.items():
            body = {(*inside, *path): f"backbone.body.{name}" for path, name in seen.items()}
            names[f"{release}, the network's by {origin}"] = body | others
    return names


def _own_name(path: Path, layers: Collection[Path]) -> str:
    """Our name, in PyTorch's words, and within an S4ND layer in the release's."""
    *parents, leaf = path
    for i in range(len(parents)):
        if path[:i] in layers:
            parents[i] = {"kernels": "kernel", "output": "output_linear.0"}.get(str(parents[i]), parents[i])
    return ".".join(map(str, [*parents, _LEAVES.get(str(leaf), leaf)]))


def _renamed(names: dict[Path, str], rules: _Rules) -> dict[Path, str]:
    renamed = {}
    for path, name in names.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[path] = name
    return renamed


def _release_stem(names: Collection[str]) -> _Rules:
    for _, beginnings, rules in _RELEASE_STEMS:
        if all(any(name.startswith(beginning) for name in names) for beginning in beginnings):
            return rules
    return ()
