import io
import re

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from flax import nnx
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from ssm_jax import plots
from ssm_jax.layers import S4DKernel
from ssm_jax.ops import conv

ROWS = [
    {"step": 1, "train/loss": 2.0, "train/accuracy": 0.1, "images_per_second": 10.0},
    {"step": 2, "train/loss": 1.0, "train/accuracy": 0.4},
    {"step": 2, "val/loss": 1.5, "val/accuracy": 0.3},
]


ENDS = ("min", "mean", "max")


def pixels(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80)
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def random_kernels(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def sampled(*rates, **options):
    """Real kernels of one axis over 16 samples of the base grid, by rate."""
    axis = S4DKernel(4, d_state=16, **options, rngs=nnx.Rngs(0))
    return {rate: np.asarray(axis(round(16 / rate), rate=rate)) for rate in rates}


def drawn(axes, label):
    """x and y of all that has this label, or is drawn like it under no label of its own."""
    return [line.get_data() for line in axes.lines if line.get_label().removeprefix("_") == label]


def lines(axes):
    return {line.get_label(): np.stack(line.get_data(), axis=-1).tolist() for line in axes.lines}


def test_training_curves_show_the_rows():
    loss, accuracy = plots.training_curves(ROWS).axes
    assert lines(loss) == {"train": [[1, 2.0], [2, 1.0]], "val": [[2, 1.5]]}
    assert lines(accuracy) == {"train": [[1, 0.1], [2, 0.4]], "val": [[2, 0.3]]}
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == ("loss", "accuracy")
    assert loss.get_yscale() == "log"


def test_training_curves_have_all_scores_and_those_of_averaged_parameters():
    rows = [*ROWS, {"step": 2, "val/mean_average_precision": 0.2, "val/ema_loss": 1.6, "val/ema_accuracy": 0.2}]
    loss, accuracy, precision = plots.training_curves(rows).axes
    assert lines(loss)["val, averaged"] == [[2, 1.6]]
    assert list(lines(accuracy)) == ["train", "val", "val, averaged"]
    assert lines(precision) == {"val": [[2, 0.2]]}
    assert precision.get_ylabel() == "mAP"


def test_curves_have_a_figure_for_all_that_rows_tell():
    rows = [
        {"step": 1, "train/loss": 2.0, "train/lr": 0.1, "images_per_second": 10.0, "train/grad_norm": 3.0},
        {"step": 1, **{f"ssm/s6la/{name}_{end}": i + 1.0 for name in ("dt", "A") for i, end in enumerate(ENDS)}},
        {"step": 2, "train/loss": 1.0, "train/lr": 0.2, "images_per_second": 11.0, "train/param_norm": 4.0},
    ]
    figures = plots.curves(rows)
    assert list(figures) == ["loss", "learning rate", "images per second", "norms", "dt of s6la", "|A| of s6la"]
    assert list(lines(figures["norms"].axes[0])) == ["grad norm", "param norm"]
    (speed,) = lines(figures["images per second"].axes[0]).values()
    assert speed == [[1, 10.0], [2, 11.0]]
    assert lines(figures["dt of s6la"].axes[0]) == {"geometric mean": [[1, 2.0]]}


def test_a_curve_of_many_rows_keeps_its_mean():
    rows = [{"step": step, "train/lr": float(step % 7)} for step in range(1, 5001)]
    (line,) = lines(plots.curves(rows)["learning rate"].axes[0]).values()
    assert len(line) == 1000
    np.testing.assert_allclose(np.mean(line, 0), [2500.5, np.mean([row["train/lr"] for row in rows])])


def test_training_curves_can_do_without_validation():
    (loss, _) = plots.training_curves(ROWS[:2]).axes
    assert list(lines(loss)) == ["train"]


def test_accuracies_are_shown_in_percent_by_resolution():
    (axes,) = plots.accuracy_by_resolution({16: 0.5, 8: 0.975, 4: 0.25}, trained_at=8).axes
    marked, curve = axes.lines
    assert np.stack(curve.get_data(), axis=-1).tolist() == [[4, 25.0], [8, 97.5], [16, 50.0]]
    assert list(marked.get_xdata()) == [8, 8]
    assert [text.get_text() for text in axes.texts] == ["25.0", "97.5", "50.0"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4 x 4", "8 x 8", "16 x 16"]


@pytest.mark.parametrize("count", [1, 8, 11])
def test_kernels_are_shown_one_by_one_each_on_its_own_scale(count):
    kernels = np.random.default_rng(0).normal(size=(count, 6, 6)) * 10.0 ** np.arange(count)[:, None, None]
    shown = [axes.images[0] for axes in plots.kernel_sheet(kernels, extent=3.0).axes if axes.images]
    assert len(shown) == count
    for image, kernel in zip(shown, kernels, strict=True):
        np.testing.assert_array_equal(image.get_array(), kernel)
        assert image.get_clim() == (-np.abs(kernel).max(), np.abs(kernel).max())
        assert tuple(image.get_extent()) == (-3, 3, 3, -3)


def test_scores_of_several_runs_are_means_with_their_deviations():
    scores = {"a": {8: [0.5, 0.7], 16: [0.2]}, "b": {8: [0.9]}, "not run": {}}
    figure = plots.score_panels([("title", "resolution", scores)])
    (axes,) = figure.axes
    lines = {bars.get_label(): bars for bars in axes.containers}
    assert [*lines] == ["a", "b"]
    np.testing.assert_allclose([*lines["a"][0].get_ydata()], [60, 20])
    (bars,) = lines["a"][2]
    deviation = 100 * np.std([0.5, 0.7], ddof=1)
    np.testing.assert_allclose([end[:, 1] for end in bars.get_segments()], [[60 - deviation, 60 + deviation], [20, 20]])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["8 x 8", "16 x 16"]
    assert axes.get_title() == "title"


def test_scores_by_frames_say_so():
    (axes,) = plots.score_panels([("title", "frames", {"a": {12: [0.5], 24: [0.6]}})]).axes
    assert axes.get_xlabel() == "frames of the test clips"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["12", "24"]


def test_scores_at_one_resolution_are_a_dot_for_each_run_and_a_mark_at_their_mean():
    scores = {"a": {8: [0.5, 0.7]}, "not run": {}, "b": {8: [0.2]}}
    (axes,) = plots.score_panels([("title", "resolution", scores)]).axes
    lines = [(line.get_xdata(), line.get_ydata()) for line in axes.lines]
    expected = [([50, 70], [0, 0]), ([60, 60], [-0.3, 0.3]), ([], []), ([20], [2]), ([20, 20], [1.7, 2.3])]
    for (x, y), (expected_x, expected_y) in zip(lines, expected, strict=True):
        np.testing.assert_allclose(x, expected_x)
        np.testing.assert_allclose(y, expected_y)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", "not run", "b"]


def test_a_kernel_of_zeros_can_be_shown():
    assert pixels(plots.kernel_sheet(np.zeros((1, 4, 4)), extent=2.0)).std() > 0


def test_kernels_have_a_title_of_their_own_or_the_lags():
    kernels = np.ones((1, 4, 4))
    assert plots.kernel_sheet(kernels, extent=2.0).get_suptitle() == "kernels, lags -2 to 2 samples"
    assert plots.kernel_sheet(kernels, extent=2.0, title="mine").get_suptitle() == "mine"


def test_a_2d_kernel_is_what_comes_out_for_an_impulse():
    """With positions 0 .. 5 and the impulse at 3, position t has lag t - 3, so that lag 0 is at [3, 3]."""
    rows, columns = random_kernels(2, 2, 3, 4, 3), random_kernels(2, 2, 3, 4, 3) ** 2
    impulse = jnp.zeros((1, 6, 6, 4)).at[:, 3, 3].set(1)
    response = conv(impulse, [jnp.asarray(rows), jnp.asarray(columns)], method="fft_nd")
    expected = np.moveaxis(np.asarray(response[0]).reshape(6, 6, 12), -1, 0)
    np.testing.assert_allclose(plots.outer_products(rows, columns), expected, atol=1e-5)


def test_a_causal_2d_kernel_has_one_quadrant():
    kernel = random_kernels(1, 1, 1, 2, 3)
    (first, _) = plots.outer_products(kernel, kernel)
    np.testing.assert_array_equal(first[3:, 3:], np.outer(kernel[0, 0, 0, 0], kernel[0, 0, 0, 0]))
    assert np.count_nonzero(first) == 9


@pytest.mark.parametrize("rate", [1, 0.25])
def test_kernel_lines_are_the_kernels_both_ways_from_lag_zero(rate):
    """Lag j lasts from j r to (j + 1) r: the first samples of both directions are half a step away from 0."""
    kernel = random_kernels(2, 3, 2, 5, 8)
    figure = plots.kernel_lines({rate: kernel}, features=(1, 7))
    for axes, (channel, head) in zip(figure.axes, [(0, 1), (1, 2)], strict=True):
        for direction, lags in enumerate([np.arange(8), -1 - np.arange(8)]):
            x, y = drawn(axes, f"rate {rate}")[direction]
            np.testing.assert_allclose(x, (lags + 0.5) * rate)
            np.testing.assert_allclose(y, kernel[direction, :, channel, head].mean(0) / rate, rtol=1e-6)


def test_a_causal_kernel_has_one_line():
    (axes,) = plots.kernel_lines({1: random_kernels(1, 1, 1, 2, 8)}, features=(1,)).axes
    assert len(drawn(axes, "rate 1")) == 1


def test_the_finest_rate_is_a_line_and_the_others_are_dots():
    kernel = random_kernels(2, 1, 1, 4, 8)
    for axes in plots.kernel_lines({1: kernel, 0.125: kernel, 2: kernel}).axes:
        styles = {line.get_label(): (line.get_linestyle(), line.get_marker()) for line in axes.lines}
        assert styles["rate 0.125"] == ("-", "None")
        assert {styles["rate 1"][0], styles["rate 2"][0]} == {"None"}
        assert styles["rate 1"][1] != styles["rate 2"][1]


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_the_dots_lie_on_the_line(discretization):
    kernels = sampled(1 / 16, 1, bandlimit=0.1, discretization=discretization)
    for axes in plots.kernel_lines(kernels).axes:
        for (x, y), (x_dots, dots) in zip(drawn(axes, "rate 0.0625"), drawn(axes, "rate 1"), strict=True):
            on_line = np.interp(np.abs(x_dots), np.abs(x), y)
            np.testing.assert_allclose(dots, on_line, atol=0.02 * np.abs(y).max())


def test_a_dot_is_the_mean_of_the_line_over_its_step():
    """However fast the kernel changes: here all modes are in it, and the dots are far off the line."""
    kernels = sampled(1 / 16, 1)
    for axes in plots.kernel_lines(kernels).axes:
        for (x, y), (x_dots, dots) in zip(drawn(axes, "rate 0.0625"), drawn(axes, "rate 1"), strict=True):
            np.testing.assert_allclose(x.reshape(16, 16).mean(1), x_dots, rtol=1e-6)
            np.testing.assert_allclose(y.reshape(16, 16).mean(1), dots, atol=1e-5)
            assert np.abs(dots - np.interp(np.abs(x_dots), np.abs(x), y)).max() > 0.1 * np.abs(y).max()


def test_a_step_response_is_the_running_sum_of_the_causal_kernel():
    kernel = random_kernels(2, 3, 2, 5, 8)
    (axes,) = plots.step_responses({0.5: kernel}, features=(7,)).axes
    ((x, y),) = drawn(axes, "rate 0.5")
    np.testing.assert_array_equal(x, 0.5 * np.arange(1, 9))
    causal = kernel[0, :, 1, 2].mean(0)
    np.testing.assert_allclose(y, [sum(causal[:count]) for count in range(1, 9)], rtol=1e-5)


def test_all_rates_have_one_step_response():
    for axes in plots.step_responses(sampled(1 / 16, 1, 2)).axes:
        ((x, y),) = drawn(axes, "rate 0.0625")
        for rate in (1, 2):
            ((x_dots, dots),) = drawn(axes, f"rate {rate}")
            at_the_end = slice(16 * rate - 1, None, 16 * rate)
            np.testing.assert_array_equal(x[at_the_end], x_dots)
            np.testing.assert_allclose(y[at_the_end], dots, atol=1e-5)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("rate", [0.5, 2])
def test_a_spectrum_is_the_fourier_sum_over_all_lags(rate, directions):
    kernel = random_kernels(directions, 3, 2, 5, 8)
    (axes,) = plots.spectra({rate: kernel}, features=(7,)).axes
    ((f, level),) = drawn(axes, "kernel")
    assert (f[0], f[-1]) == (0, 0.5 / rate)
    forward, backward = kernel[0, :, 1, 2].mean(0), kernel[-1, :, 1, 2].mean(0) * (directions - 1)
    waves = np.exp(-2j * np.pi * rate * np.outer(f, np.arange(-8, 8)))
    np.testing.assert_allclose(10 ** (level / 20), np.abs(waves @ [*backward[::-1], *forward]), rtol=1e-3, atol=1e-4)


def test_spectra_have_a_row_for_each_feature_and_a_column_for_each_rate_from_coarse_to_fine():
    kernel = random_kernels(2, 1, 1, 4, 8)
    panels = plots.spectra({1: kernel, 0.5: kernel, 2: kernel}, features=(3, 0)).axes
    assert [axes.get_title() for axes in panels] == ["rate 2", "rate 1", "rate 0.5", "", "", ""]
    assert [re.findall(r"feature \d", axes.get_ylabel()) for axes in panels[::3]] == [["feature 3"], ["feature 0"]]
    nyquist = [drawn(axes, "Nyquist frequency of the grid")[0][0] for axes in panels]
    assert [list(x) for x in nyquist] == 2 * [[0.25, 0.25], [0.5, 0.5], [1.0, 1.0]]


@pytest.mark.parametrize(("grid", "edges"), [("base", [0.1, 0.1, 0.1]), ("current", [0.05, 0.1, 0.2])])
def test_the_band_limit_is_a_fraction_of_the_nyquist_frequency_of_its_grid(grid, edges):
    kernel, frequencies = random_kernels(2, 1, 2, 4, 8), np.array([[0.3, 0.4], [0.3, 0.4], [0, 0.07], [0.3, 0.4]])
    kernels = {2: kernel, 1: kernel, 0.5: kernel}
    figure = plots.spectra(kernels, bandlimit=0.2, bandlimit_grid=grid, frequencies=frequencies, features=(6,))
    for axes, edge in zip(figure.axes, edges, strict=True):
        ((x, _),) = drawn(axes, "band limit")
        np.testing.assert_allclose(x, edge)
        # Feature 6 is channel 1 of head 2, which has modes at 0 and 0.07.
        kept, dropped = ([f for f in (0, 0.07) if (f < edge) == side] for side in (True, False))
        assert [[*x] for x, _ in drawn(axes, "modes")] == [kept]
        assert [[*x] for x, _ in drawn(axes, "modes dropped")] == [dropped] * bool(dropped)


def test_the_ticks_that_a_spectrum_calls_dropped_are_the_modes_that_the_kernel_drops():
    axis = S4DKernel(4, d_state=16, bandlimit=0.5, bandlimit_grid="current", rngs=nnx.Rngs(0))
    A, _, C, dt = axis.continuous()
    kernels = {rate: np.asarray(axis(8, rate=rate)) for rate in (2, 0.5)}
    frequencies = dt * jnp.abs(A.imag) / (2 * np.pi)
    panels = plots.spectra(kernels, bandlimit=0.5, bandlimit_grid="current", frequencies=frequencies).axes
    for axes, (feature, rate) in zip(panels, [(0, 2), (0, 0.5), (1, 2), (1, 0.5)], strict=True):
        left = np.count_nonzero(axis._limited(C, A, dt, rate)[0, feature])
        assert 0 < left < 8
        assert [len(x) for x, _ in drawn(axes, "modes")] == [left]
        assert [len(x) for x, _ in drawn(axes, "modes dropped")] == [8 - left]


def test_a_kernel_within_a_band_limit_has_one_spectrum_at_all_rates_and_one_of_all_modes_has_not():
    limited, free = sampled(1, 1 / 16, bandlimit=0.2), sampled(1, 1 / 16)
    panels = plots.spectra(limited, free, bandlimit=0.2, features=(3,)).axes

    def off(label):
        (f, coarse), (f_fine, fine) = (drawn(axes, label)[0] for axes in panels)
        np.testing.assert_allclose(f, f_fine[: len(f)], rtol=1e-6)
        coarse, fine = 10 ** (coarse / 20), 10 ** (fine / 20)
        return np.abs(coarse - fine[: len(f)]).max() / fine.max()

    assert off("within the band limit") < 0.05
    assert off("all modes") > 0.2


def test_a_kernel_without_modes_has_an_empty_spectrum():
    (axes,) = plots.spectra({1: np.zeros((2, 1, 1, 1, 8))}, features=(0,)).axes
    assert np.isneginf(drawn(axes, "kernel")[0][1]).all()


@pytest.mark.parametrize("plot", [plots.kernel_lines, plots.step_responses, plots.spectra])
def test_kernels_and_features_that_cannot_be_shown_are_refused(plot):
    kernel = random_kernels(2, 1, 1, 2, 8)
    with pytest.raises(ValueError, match=r"^kernels must be .* got shape \(2, 8\)\.$"):
        plot({1: kernel[:, 0, 0, 0]}, features=(0,))
    with pytest.raises(ValueError, match=r"^kernels must have at least one rate, got none\.$"):
        plot({}, features=(0,))
    for features in [(0, 2), (-1,), ()]:
        with pytest.raises(
            ValueError, match=rf"^features must be one or more of 0 \.\. 1, got {re.escape(str(features))}"
        ):
            plot({1: kernel}, features=features)


def test_spectra_that_cannot_be_compared_are_refused():
    kernel = random_kernels(2, 1, 1, 2, 8)
    with pytest.raises(ValueError, match=r"^unlimited must have the rates of kernels, \[1, 2\], got \[1\]"):
        plots.spectra({1: kernel, 2: kernel}, {1: kernel})
    with pytest.raises(ValueError, match=r"^bandlimit_grid must be 'base' or 'current', got 'fine'"):
        plots.spectra({1: kernel}, bandlimit_grid="fine")


@pytest.mark.parametrize("channels", [1, 3])
def test_predictions_are_shown_over_their_images(channels):
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 4, channels), np.uint8)
    labels = np.zeros(9, int)
    predictions = np.array([0, 1, 0, 0, 0, 0, 0, 0, 0])
    sheet = plots.prediction_sheet(images, labels, predictions, ["cat", "dog"])
    shown = [axes for axes in sheet.axes if axes.images]
    assert [axes.get_title() for axes in shown] == ["cat", "dog (is cat)", *["cat"] * 7]
    colors = [axes.title.get_color() for axes in shown]
    assert colors[1] != colors[0]
    assert len(set(colors[2:])) == 1
    for axes, image in zip(shown, images, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), image.squeeze())


def test_layers_of_all_stages_are_counted_on_and_each_has_its_quantiles():
    stages = [np.exp(np.random.default_rng(i).normal(size=(layers, 3, 50))) for i, layers in enumerate((3, 1, 2))]
    delta, memory = plots.by_layer({"Delta": stages, "memory": [1 / stage for stage in stages]}).axes
    assert (delta.get_ylabel(), memory.get_ylabel(), delta.get_yscale()) == ("Delta", "memory", "log")
    for axes, power in [(delta, 1), (memory, -1)]:
        for label, summary in [("median", np.median), ("mean", np.mean)]:
            points = drawn(axes, label)
            assert [x.tolist() for x, _ in points] == [[1, 2, 3], [4], [5, 6]]
            for (_, y), stage in zip(points, stages, strict=True):
                np.testing.assert_allclose(y, [summary(layer**power) for layer in stage])
        for band, stage in zip(axes.collections, stages, strict=True):
            low, high = np.quantile(stage.reshape(len(stage), -1) ** power, [0.1, 0.9], axis=1)
            edges = band.get_paths()[0].vertices[:, 1]
            np.testing.assert_allclose([edges.min(), edges.max()], [low.min(), high.max()])


def test_contributions_are_shown_in_percent_of_their_state():
    first, second = np.array([[0.0, 2, 0], [0, 1, 3]]), np.array([[3.0, 1, 0, 0], [1, 1, 2, 0], [0, 0, 0, 0]])
    left, right, _ = plots.contributions([first, second]).axes
    assert [text.get_text() for text in left.texts] == ["0", "100", "0", "25", "75"]
    assert [text.get_text() for text in right.texts] == ["75", "25", "25", "25", "50", "0", "0", "0", "0"]
    np.testing.assert_array_equal(left.images[0].get_array().filled(-1), [[0, 100, -1], [0, 25, 75]])
    assert [label.get_text() for label in right.get_xticklabels()] == ["before", "3", "4", "5"]
    assert [label.get_text() for label in right.get_yticklabels()] == ["3", "4", "5"]


def test_what_is_read_is_shown_beside_its_image_on_one_scale():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), np.uint8)
    stages = [[np.random.default_rng(i).uniform(size=(2, size, size)) for i in range(2)] for size in (8, 4)]
    *shown, _ = plots.read_maps(images, stages).axes
    columns = [images[..., 0], *stages[0], *stages[1]]
    assert [axes.get_title() for axes in shown[:5]] == ["image", "layer 1", "2", "3", "4"]
    for (row, column), axes in zip(np.ndindex(2, 5), shown, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), columns[column][row])
    limit = max(layer.max() for stage in stages for layer in stage)
    assert {axes.images[0].get_clim() for axes in shown} == {(0, 255), (0, limit)}


def test_reading_nothing_can_be_shown():
    *_, last, _ = plots.read_maps(np.zeros((1, 4, 4, 3), np.uint8), [[np.zeros((1, 2, 2))]]).axes
    assert last.images[0].get_clim() == (0, 1)


@pytest.mark.parametrize(
    "figure",
    [
        lambda: plots.training_curves(ROWS),
        lambda: plots.accuracy_by_resolution({4: 0.5, 8: 0.9}, trained_at=8),
        lambda: plots.kernel_sheet(np.random.default_rng(0).normal(size=(9, 6, 6)), extent=3.0),
        lambda: plots.kernel_lines({1: random_kernels(2, 1, 1, 4, 8), 0.5: random_kernels(2, 1, 1, 4, 16)}),
        lambda: plots.step_responses({1: random_kernels(2, 1, 1, 4, 8)}),
        lambda: plots.spectra({1: random_kernels(2, 1, 1, 4, 8)}, bandlimit=0.5, frequencies=np.full((4, 2), 0.1)),
        lambda: plots.prediction_sheet(np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, int), np.zeros(2, int), ["a"]),
        lambda: plots.by_layer({"Delta": [np.ones((2, 3)), np.ones((1, 3))]}),
        lambda: plots.contributions([np.tril(np.ones((3, 4)), 1), np.tril(np.ones((14, 15)), 1)]),
        lambda: plots.read_maps(np.zeros((2, 4, 4, 1), np.uint8), [[np.random.default_rng(0).uniform(size=(2, 4, 4))]]),
    ],
    ids=[
        "training_curves",
        "accuracy_by_resolution",
        "kernel_sheet",
        "kernel_lines",
        "step_responses",
        "spectra",
        "prediction_sheet",
        "by_layer",
        "contributions",
        "read_maps",
    ],
)
def test_figures_can_be_drawn_without_a_display(figure):
    picture = pixels(figure())
    assert picture.std() > 5
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10


def test_no_figure_is_left_open():
    """Figures are made without pyplot, which would keep every one of them."""
    plots.training_curves(ROWS)
    assert matplotlib._pylab_helpers.Gcf.get_all_fig_managers() == []


def objects(boxes, classes, scores=None, masks=None):
    return plots.Drawn(np.array(boxes, float).reshape(-1, 4), np.array(classes, int), scores, masks)


def test_objects_are_drawn_where_they_are():
    image = np.full((40, 60, 3), 128, np.uint8)
    mask = np.zeros((1, 40, 60), bool)
    mask[0, 10:20, 5:25] = True
    truth = objects([[5, 10, 25, 20], [30, 0, 60, 40]], [1, 0])
    found = objects([[6, 9, 24, 21]], [1], np.array([0.875]), mask)
    sheet = plots.detection_sheet([image] * 3, {"truth": [truth] * 3, "found": [found] * 3}, ["cat", "dog"])
    first, second = sheet.axes[:2]
    assert [axes.get_title() for axes in (first, second)] == ["truth", "found"]
    assert [patch.get_bbox().extents.tolist() for patch in first.patches] == [[30, 0, 60, 40], [5, 10, 25, 20]]
    assert [text.get_text() for text in first.texts] == ["cat", "dog"]
    assert [text.get_text() for text in second.texts] == ["dog 0.88"]
    plain, drawn = first.images[0].get_array(), second.images[0].get_array()
    np.testing.assert_array_equal((plain != drawn).any(-1), mask[0])
    assert first.patches[1].get_edgecolor() == second.patches[0].get_edgecolor()  # of one class
    assert first.patches[0].get_edgecolor() != first.patches[1].get_edgecolor()


def test_an_image_without_objects_is_drawn_alone():
    sheet = plots.detection_sheet([np.zeros((8, 8, 3), np.uint8)], {"": [objects([], [])]}, [])
    (axes,) = sheet.axes
    assert (len(axes.images), len(axes.patches), len(axes.texts)) == (1, 0, 0)


def test_labels_are_in_the_image_and_do_not_hide_each_other():
    """Of forty boxes all over an image and over its edges, those of the highest scores have theirs."""
    rng = np.random.default_rng(0)
    corners, sides = rng.uniform(-10, 210, (40, 2)), rng.uniform(4, 90, (40, 2))
    scores = rng.uniform(size=40)
    found = objects(np.concatenate([corners, corners + sides], axis=1), rng.integers(0, 3, 40), scores)
    image = np.zeros((220, 300, 3), np.uint8)
    sheet = plots.detection_sheet([image], {"": [found]}, ["dog", "traffic light", "cup"])
    FigureCanvasAgg(sheet).draw()
    (axes,) = sheet.axes
    labels = np.array([text.get_bbox_patch().get_window_extent().extents for text in axes.texts])
    whole = axes.get_window_extent().extents
    assert len(labels) > 20
    assert (labels[:, :2] >= whole[:2] - 1).all()
    assert (labels[:, 2:] <= whole[2:] + 1).all()
    common = np.minimum(labels[:, None, 2:], labels[None, :, 2:]) - np.maximum(labels[:, None, :2], labels[None, :, :2])
    assert (np.clip(common, 0, None).min(-1) <= 1 + 1e3 * np.eye(len(labels))).all()  # a pixel of rounding
    assert axes.texts[0].get_text().endswith(f"{scores.max():.2f}")


def test_colors_of_eighty_classes_are_apart():
    colors = np.array([plots.detections.class_color(number) for number in range(80)])
    distances = np.linalg.norm(colors[:, None] - colors, axis=-1) + np.eye(80)
    assert distances.min() > 0.1
    assert distances[:10, :10].min() > 0.3
