import io

import matplotlib
import numpy as np
import pytest
from PIL import Image

from ssm_jax import plots

ROWS = [
    {"step": 1, "train/loss": 2.0, "train/accuracy": 0.1, "images_per_second": 10.0},
    {"step": 2, "train/loss": 1.0, "train/accuracy": 0.4},
    {"step": 2, "val/loss": 1.5, "val/accuracy": 0.3},
]


def pixels(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=80)
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def lines(axes):
    return {line.get_label(): np.stack(line.get_data(), axis=-1).tolist() for line in axes.lines}


def test_training_curves_show_the_rows():
    loss, accuracy = plots.training_curves(ROWS).axes
    assert lines(loss) == {"train": [[1, 2.0], [2, 1.0]], "val": [[2, 1.5]]}
    assert lines(accuracy) == {"train": [[1, 0.1], [2, 0.4]], "val": [[2, 0.3]]}
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == ("loss", "accuracy")
    assert loss.get_yscale() == "log"


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


def test_a_kernel_of_zeros_can_be_shown():
    assert pixels(plots.kernel_sheet(np.zeros((1, 4, 4)), extent=2.0)).std() > 0


def test_kernels_have_a_title_of_their_own_or_the_lags():
    kernels = np.ones((1, 4, 4))
    assert plots.kernel_sheet(kernels, extent=2.0).get_suptitle() == "kernels, lags -2 to 2 samples"
    assert plots.kernel_sheet(kernels, extent=2.0, title="mine").get_suptitle() == "mine"


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


@pytest.mark.parametrize(
    "figure",
    [
        lambda: plots.training_curves(ROWS),
        lambda: plots.accuracy_by_resolution({4: 0.5, 8: 0.9}, trained_at=8),
        lambda: plots.kernel_sheet(np.random.default_rng(0).normal(size=(9, 6, 6)), extent=3.0),
        lambda: plots.prediction_sheet(np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, int), np.zeros(2, int), ["a"]),
    ],
    ids=["training_curves", "accuracy_by_resolution", "kernel_sheet", "prediction_sheet"],
)
def test_figures_can_be_drawn_without_a_display(figure):
    picture = pixels(figure())
    assert picture.std() > 5
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10


def test_no_figure_is_left_open():
    """Figures are made without pyplot, which would keep every one of them."""
    plots.training_curves(ROWS)
    assert matplotlib._pylab_helpers.Gcf.get_all_fig_managers() == []
