import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import ssm_jax


@functools.cache
def summary_of(name, shape=(1, 224, 224, 3), **arguments):
    model = nnx.eval_shape(lambda: ssm_jax.create_model(name, num_classes=1000, **arguments, rngs=nnx.Rngs(0)))
    return ssm_jax.summary(model, shape)


@pytest.mark.parametrize(
    ("name", "parameters", "giga_multiply_adds"),
    [
        # As counted for the comparison of S6LA; ConvNeXt-T and Swin-T as their papers say.
        ("resnet50", 25_557_032, 4.089),
        ("resnet101", 44_549_160, 7.801),
        ("convnext_tiny", 28_589_128, 4.456),
        ("swin_tiny", 28_288_354, 4.5),
        ("deit_small", 22_050_664, 4.6),
    ],
)
def test_known_networks_cost_what_is_known(name, parameters, giga_multiply_adds):
    total = summary_of(name).total
    assert total.parameters == parameters
    digits = len(str(giga_multiply_adds).partition(".")[2])
    assert round(total.multiply_adds / 1e9, digits) == giga_multiply_adds


def test_parts_add_up_and_come_in_the_order_of_the_network():
    summary = summary_of("convnext_tiny")
    names = [part.name for part in summary.parts]
    stages = ["stem", "stages.0", "downsamples.0", "stages.1", "downsamples.1", "stages.2", "downsamples.2", "stages.3"]
    assert [name for name in names if name in (*stages, "norm", "head")] == [*stages, "norm", "head"]
    for field in ("parameters", "multiply_adds", "saved_bytes"):
        assert sum(getattr(part, field) for part in summary.parts) == getattr(summary.total, field)
    head = summary.parts[names.index("head")]
    assert (head.kind, head.parameters, head.multiply_adds) == ("Linear", 769_000, 768_000)


def test_work_and_memory_are_proportional_to_the_batch():
    two, four, six = (summary_of("resnet18", (n, 64, 64, 3)).total for n in (2, 4, 6))
    assert four.multiply_adds == 2 * two.multiply_adds
    assert six.saved_bytes - four.saved_bytes == four.saved_bytes - two.saved_bytes  # what parameters become is apart
    assert four.saved_bytes > 1.5 * two.saved_bytes


def test_loops_count_as_often_as_they_run():
    plain, loop = (summary_of("deit_tiny", scan=scan).total for scan in (False, True))
    assert loop.multiply_adds == plain.multiply_adds


def test_rematerialisation_saves_memory():
    plain, remat = (summary_of("deit_tiny", remat=remat).total for remat in ("none", "nothing_saveable"))
    assert remat.saved_bytes < plain.saved_bytes / 5
    assert remat.multiply_adds == plain.multiply_adds


class Net(nnx.Module):
    def __init__(self, *, rngs):
        self.conv = nnx.Conv(4, 6, (3, 5), strides=2, feature_group_count=2, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(6))

    def __call__(self, x):
        x = jnp.sin(self.conv(x)) * self.scale[...][None, None, None]
        return jnp.fft.rfft(x, n=16, axis=1).real


def test_operations_are_counted_as_defined():
    summary = ssm_jax.summary(Net(rngs=nnx.Rngs(0)), (3, 16, 8, 4))
    conv, rest = {part.name: part for part in summary.parts}["conv"], summary.total
    assert conv.multiply_adds == 3 * 8 * 4 * 6 * (3 * 5 * 4 // 2)
    assert rest.multiply_adds - conv.multiply_adds == 3 * 4 * 6 * 16 * 4  # n log2(n) for each of the real FFTs
    assert conv.parameters == 3 * 5 * 2 * 6 + 6
    assert summary.total.parameters == conv.parameters + 6
    # The input of sin, its output, and a copy of the factor for the product; the input and the parameters are given.
    maps = 3 * 8 * 4 * 6 * 4
    assert maps <= summary.total.saved_bytes <= 2.2 * maps


def test_complex_products_count_four():
    class Complex(nnx.Module):
        def __call__(self, x):
            return jnp.abs(jax.lax.complex(x, x) @ jnp.ones((4, 5), jnp.complex64))

    assert ssm_jax.summary(Complex(), (3, 4)).total.multiply_adds == 4 * 3 * 4 * 5


def test_a_table_shows_every_part():
    text = str(summary_of("resnet18", (1, 64, 64, 3)))
    assert "ResNet: (1, 64, 64, 3) -> (1, 1000)" in text
    for expected in ("stages.3", "11,689,512", "multiply-adds, G", "saved, MB"):
        assert expected in text


def test_nothing_is_changed_in_the_model():
    model = Net(rngs=nnx.Rngs(0))
    before = nnx.graphdef(model)
    ssm_jax.summary(model, (3, 16, 8, 4))
    assert nnx.graphdef(model) == before
