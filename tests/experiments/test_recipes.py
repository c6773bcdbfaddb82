"""Every recipe in configs/ has a network of its paper's size, and a small one of its kind trains."""

import jax
import numpy as np
import pytest
import standin
from ml_collections import ConfigDict

from benchmarks import meshes
from experiments import smoke
from experiments.config import check
from experiments.configs import count_parameters, recipes
from experiments.experiment import build
from experiments.problem import load
from ssm_jax.compiled import Collective, collectives
from ssm_jax.training import sharding

RECIPES = {recipe.name: recipe.config for recipe in recipes()}

PARAMETERS = {
    # Of the release's networks and those of the paper's table, exactly.
    "s4nd/celeb_a_convnext.py:160": 9_237_608,
    "s4nd/celeb_a_convnext_s4nd.py:160": 9_628_040,
    "s4nd/cifar10_iso.py": 5_282_826,
    "s4nd/cifar10_iso_conv2d.py:3x3": 2_158_602,
    "s4nd/cifar10_iso_conv2d.py:5x5": 2_224_138,
    "s4nd/hmdb51_i3d.py": 28_513_107,
    "s4nd/hmdb51_s3d.py": 27_859_406,
    "s4nd/hmdb51_s4nd.py": 31_381_587,
    "s4nd/imagenet_convnext.py": 28_589_128,
    "s4nd/imagenet_convnext_s4nd.py": 30_007_057 - 3,  # the release's stem has a D for 3 channels and does not use it
    "s4nd/imagenet_convnext_s4nd.py:released": 29_409_457 - 3,
    "s4nd/imagenet_vit_b16.py": 86_540_008,
    "s4nd/imagenet_vit_s4nd.py": 88_786_408,
    "s6la/imagenet_deit_base.py": 86_567_656,
    "s6la/imagenet_deit_small.py": 22_050_664,
    "s6la/imagenet_deit_tiny.py": 5_717_416,
    "s6la/imagenet_pvt_v2_b0.py": 3_666_760,
    "s6la/imagenet_pvt_v2_b1.py": 14_009_000,
    "s6la/imagenet_pvt_v2_b2.py": 25_362_856,
    "s6la/imagenet_swin_base.py": 87_768_224,
    "s6la/imagenet_swin_small.py": 49_606_258,
    "s6la/imagenet_swin_tiny.py": 28_288_354,
}
MILLIONS = {"": (25.557, 44.549, 60.193), "_rla": (25.871, 45.003, 60.771)}
MILLIONS |= {"_mrla_light": (25.738, 44.940, 60.768), "_s6la": (26.047, 45.178, 60.945)}

FAST = (
    "s4nd/cifar10_progressive_16.py:small",
    "s4nd/celeb_a_convnext.py:160",
    "s6la/imagenet_resnet101_s6la.py",
    "s6la/imagenet_deit_base.py",
)
"""One of each kind of data and family, for `make test` and the run in tree mode; the others are slow."""


KINDS = smoke.kinds(
    {name: config for name, config in RECIPES.items() if config.data.name not in ("digits", "image_folder")}
)
"""Without those that train in test_train.py and test_families.py."""


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    """Gives the folder of a dataset's stand-in."""
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = standin.make(name, tmp_path_factory.mktemp(name))
        return str(folders[name])

    return folder


@pytest.fixture(autouse=True)
def divided(monkeypatch):
    """Cut networks have no parameters of 1 MiB, from which on they are divided."""
    monkeypatch.setattr(sharding, "_MIN_SHARDED_BYTES", meshes.SMALL)


def smoke_run(name, stand_in):
    """On 2 x 4 devices, of which each four share the parameters."""
    config = ConfigDict(RECIPES[name].to_dict())
    config.smoke = True
    config.mesh.fsdp = 4
    config.data.dir = stand_in(config.data.name)
    return build(config)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if {*FAST} & {*KINDS[name]} else pytest.mark.slow) for name in KINDS]
)
def test_a_small_network_of_the_kind_trains(name, stand_in):
    """And devices exchange no more than that takes."""
    experiment = smoke_run(name, stand_in)
    assert experiment.total_steps == 2 * len(experiment.stages)
    with jax.set_mesh(experiment.mesh):
        state = experiment.init()
        before = jax.device_get(state.params)
        batches = experiment.train_batches()
        for stage in experiment.stages:
            step = experiment.train_step(stage).lower(state, experiment.abstract_batch).compile()
            assert not meshes.unneeded(collectives(step.as_text()), experiment, [stage])
            for _ in range(2):
                state, metrics = step(state, experiment.put(next(batches)))
                assert np.isfinite(metrics["loss"])
        scores = experiment.evaluate(state, "test", experiment.resolution).scores
    assert np.isfinite([*scores.values()]).all()
    changed = jax.tree.map(lambda old, new: np.any(old != new), before, jax.device_get(state.params))
    # All but the P of diagonal systems, 0, what is behind a map that starts at 0, as S6LA's, and what is behind a layer
    # scale of 1e-6, where Adam's epsilon is not small.
    frozen = jax.tree.map(lambda group: group == "frozen", experiment.groups)
    assert not any(jax.tree.leaves(jax.tree.map(np.logical_and, changed, frozen)))
    free = [moved for moved, held in zip(*map(jax.tree.leaves, (changed, frozen)), strict=True) if not held]
    assert np.mean(free) > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["s4nd/cifar10_iso.py", "s6la/imagenet_deit_base.py"])
def test_losses_are_those_of_one_device_on_any_mesh(name):
    """As `python -m benchmarks.meshes` finds for all kinds."""
    for mesh, result in meshes.compare(RECIPES[name], steps=2, growth=False).items():
        assert result["apart"] < 2e-5, mesh
        assert not result["unneeded"], mesh


def test_what_is_not_needed_is_told(divided):
    """An all-gather of activations, sums as of these, and rows that wander although mixing needs none."""
    config = meshes.cut(RECIPES["s4nd/cifar10_iso.py"], {"data": -1, "fsdp": 4}, 8)
    experiment = build(config, files=False)
    activations = 4 * 32 * 32 * 1024
    for kind in ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all"):
        complaints = meshes.unneeded([Collective(kind, activations, 4, 1, "")], experiment)
        assert len(complaints) >= 1, kind
    assert not meshes.unneeded([Collective("all-reduce", 64, 8, 1, "")], experiment)


@pytest.mark.parametrize("name", FAST)
def test_a_cut_run_has_the_recipes_data_and_classes(name, stand_in):
    config = RECIPES[name]
    experiment = smoke_run(name, stand_in)
    classes = {"celeb_a": 40, "cifar10": 10, "imagenet2012": 1000}
    assert experiment.dataset.num_classes == classes[config.data.name]
    batch = next(experiment.train_batches())
    assert batch["image"].shape == (experiment.config.batch_size, *2 * [experiment.dataset.resolution], 3)
    assert {stage.resolution for stage in experiment.stages} == {*config.stages.resolutions} or not config.stages.epochs
    for option in ("augment.rand_augment", "augment.repeats", "optimizer.name", "optimizer.lr", "ema_decay", "dtype"):
        assert _field(experiment.config, option) == _field(config, option)


def _field(config, name):
    for part in name.split("."):
        config = config[part]
    return config


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_the_network_has_the_papers_size_and_the_fields_their_ranges(name):
    """Building it, with shapes for arrays, also checks its arguments."""
    check(RECIPES[name])
    count = count_parameters(RECIPES[name])
    assert count == PARAMETERS.get(name, count)


@pytest.mark.slow
@pytest.mark.parametrize("method", MILLIONS)
def test_aggregated_resnets_have_the_counted_sizes(method):
    names = [f"s6la/imagenet_resnet{depth}{method}.py" for depth in (50, 101, 152)]
    assert [count_parameters(RECIPES[name]) / 1e6 for name in names] == pytest.approx(MILLIONS[method], abs=6e-4)


@pytest.mark.slow
def test_s6la_adds_to_transformers_what_was_counted():
    extra = {"deit_tiny": 0.170, "deit_small": 0.452, "deit_base": 1.346}
    extra |= {"swin_tiny": 0.490, "swin_small": 0.942, "swin_base": 1.474}
    extra |= {"pvt_v2_b0": 0.075, "pvt_v2_b1": 0.199, "pvt_v2_b2": 0.393}
    added = {
        name: (
            count_parameters(RECIPES[f"s6la/imagenet_{name}_s6la.py"])
            - count_parameters(RECIPES[f"s6la/imagenet_{name}.py"])
        )
        / 1e6
        for name in extra
    }
    assert added == pytest.approx(extra, abs=6e-4)


def test_every_number_that_is_aimed_at_has_a_source():
    for name, config in RECIPES.items():
        if config.published.value is not None:
            assert 0 < config.published.value < 100, name
            assert config.published.metric, name
            assert config.published.source, name
        if "s6la" in config.model.name:
            assert config.published.value is None, name


def test_a_shortened_source_ends():
    config = RECIPES["s4nd/cifar10_iso.py"].copy_and_resolve_references()
    config.data.name = "digits"
    dataset = smoke.shorten(load(config), config)
    assert len([*dataset.splits["train"]]) == 2 * config.batch_size
