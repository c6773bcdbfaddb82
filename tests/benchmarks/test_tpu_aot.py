import importlib.util

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from benchmarks import tpu_aot
from benchmarks.tpu_aot import Estimate
from ssm_jax.ops.conv import choose


@pytest.mark.parametrize("case", tpu_aot.CASES)
@pytest.mark.parametrize("method", ["depthwise", "auto", "toeplitz"])
def test_layers_keep_the_shape_of_their_case(case, method):
    shape = tpu_aot.CASES[case]
    layer = tpu_aot.layer(method, len(shape) - 2, shape[-1], "bfloat16")
    u = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    assert nnx.eval_shape(lambda layer, u: layer(u), layer, u) == u


def test_kernels_alone_are_those_of_the_layer():
    kernels = tpu_aot.layer("kernels", 2, 8, "bfloat16")
    shapes = nnx.eval_shape(lambda layer, u: layer(u), kernels, jax.ShapeDtypeStruct((2, 5, 3, 8), jnp.bfloat16))
    assert [(x.shape, x.dtype) for x in shapes] == [((2, 1, 1, 8, n), jnp.float32) for n in (5, 3)]


def test_picture_shows_times_relative_to_the_depthwise_convolution():
    def milliseconds(x):
        return Estimate(x, 0, 0, 0)

    figure = tpu_aot.picture(
        {
            ("a", "depthwise"): milliseconds(2.0),
            ("a", "kernels"): milliseconds(0.5),
            ("a", "toeplitz"): milliseconds(1.0),
            ("a", "dft"): milliseconds(3.0),
            ("b", "depthwise"): milliseconds(4.0),
            ("b", "toeplitz"): milliseconds(6.0),
            ("b", "dft"): milliseconds(4.0),
        },
        "title",
    )
    (axes,) = figure.axes
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
    assert heights == {"toeplitz": [0.5, 1.5], "dft": [1.5, 1.0]}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]


def test_without_libtpu_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[tpu\]'"):
        tpu_aot.chip()


@pytest.fixture(scope="module")
def chip():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("compiling for TPUs needs libtpu: pip install -e '.[tpu]'")
    return tpu_aot.chip()


def compiled(fn, shape, dtype, chip):
    return jax.jit(fn, in_shardings=chip).lower(jax.ShapeDtypeStruct(shape, dtype)).compile()


def test_a_large_product_runs_near_the_peak(chip):
    n, peak = 4096, 197e12  # FLOP/s of a v5e in bfloat16
    seconds = tpu_aot.estimate(compiled(lambda x: x @ x, (n, n), jnp.bfloat16, chip)).milliseconds / 1e3
    assert 1 <= seconds * peak / (2 * n**3) < 1.5


def test_a_large_sum_runs_near_the_bandwidth_of_the_memory(chip):
    gigabytes, peak = 2 * 4 * 2**28 / 1e9, 819  # GB/s
    numbers = tpu_aot.estimate(compiled(lambda x: x + 1, (2**8, 2**10, 2**10), jnp.float32, chip))
    assert numbers.gigabytes == pytest.approx(gigabytes)
    assert 1 <= numbers.milliseconds / 1e3 * peak / gigabytes < 1.5


def test_a_scan_takes_as_long_as_its_turns(chip):
    def cycles(turns):
        def fn(x):
            return jax.lax.scan(lambda x, _: (jnp.sin(x) @ x, None), x, length=turns)[0]

        return tpu_aot.estimate(compiled(fn, (256, 256), jnp.float32, chip)).milliseconds

    assert cycles(70) == pytest.approx(10 * cycles(7), rel=0.05)


def test_auto_is_what_a_tpu_would_choose(chip):
    def program(method):
        return tpu_aot.lower(tpu_aot.layer(method, 1, 8, "float32"), (2, 196, 8), "float32", chip).as_text()

    here, there = (choose(196, backend) for backend in ("cpu", "tpu"))
    assert program("auto") == program(there) != program(here)
