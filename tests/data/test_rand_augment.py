import collections
import pickle

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from ssm_jax.data import rand_augment
from ssm_jax.data.rand_augment import OPS, RandAugment

BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
FILL = (124, 116, 104)

_STEPS = np.random.default_rng(0).integers(20, 220, (3, 4, 3), dtype=np.uint8)
RGB = Image.fromarray(_STEPS).resize((40, 30), BICUBIC)
"""Smooth, and not of the full range, so that each operation changes it."""
GREY = RGB.convert("L")

LEVELS = (0.0, 3.0, 7.2, 9.0, 10.0)

# timm 1.0.31, LEVEL_TO_ARG: at LEVELS with sign +, and with sign - where that differs
ROTATION = ([0.0, 9.0, 21.6, 27.0, 30.0], [0.0, -9.0, -21.6, -27.0, -30.0])
SHEAR = ([0.0, 0.09, 0.216, 0.27, 0.3], [0.0, -0.09, -0.216, -0.27, -0.3])
TRANSLATION = ([0.0, 0.135, 0.324, 0.405, 0.45], [0.0, -0.135, -0.324, -0.405, -0.45])
FACTOR = ([0.1, 0.64, 1.396, 1.72, 1.9],) * 2
INCREASING_FACTOR = ([1.0, 1.27, 1.648, 1.81, 1.9], [1.0, 0.73, 0.352, 0.19, 0.1])
ARGUMENTS = {
    "AutoContrast": ([None] * 5,) * 2,
    "Equalize": ([None] * 5,) * 2,
    "Invert": ([None] * 5,) * 2,
    "Rotate": ROTATION,
    "Posterize": ([0, 1, 2, 3, 4],) * 2,
    "PosterizeIncreasing": ([4, 3, 2, 1, 0],) * 2,
    "Solarize": ([0, 76, 184, 230, 256],) * 2,
    "SolarizeIncreasing": ([256, 180, 72, 26, 0],) * 2,
    "SolarizeAdd": ([0, 33, 79, 99, 110],) * 2,
    "Color": FACTOR,
    "ColorIncreasing": INCREASING_FACTOR,
    "Contrast": FACTOR,
    "ContrastIncreasing": INCREASING_FACTOR,
    "Brightness": FACTOR,
    "BrightnessIncreasing": INCREASING_FACTOR,
    "Sharpness": FACTOR,
    "SharpnessIncreasing": INCREASING_FACTOR,
    "ShearX": SHEAR,
    "ShearY": SHEAR,
    "TranslateXRel": TRANSLATION,
    "TranslateYRel": TRANSLATION,
}

WITHOUT_STRENGTH = {"AutoContrast", "Equalize", "Invert"}
GEOMETRIC = {"Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"}
INCREASING = {"Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness"}


def affine(image, matrix, filter, fill):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, filter, fillcolor=fill)


def by_value(table):
    """The operation that maps each value v to table(v), in int64."""
    return lambda image, x, filter, fill: Image.fromarray(table(np.asarray(image).astype(int), x).astype(np.uint8))


ORACLES = {
    "AutoContrast": lambda image, x, filter, fill: ImageOps.autocontrast(image),
    "Equalize": lambda image, x, filter, fill: ImageOps.equalize(image),
    "Invert": by_value(lambda v, x: 255 - v),
    "Posterize": by_value(lambda v, bits: v // 2 ** (8 - bits) * 2 ** (8 - bits)),
    "Solarize": by_value(lambda v, threshold: np.where(v < threshold, v, 255 - v)),
    "SolarizeAdd": by_value(lambda v, added: np.where(v < 128, np.minimum(v + added, 255), v)),
    "Color": lambda image, x, filter, fill: ImageEnhance.Color(image).enhance(x),
    "Contrast": lambda image, x, filter, fill: ImageEnhance.Contrast(image).enhance(x),
    "Brightness": lambda image, x, filter, fill: ImageEnhance.Brightness(image).enhance(x),
    "Sharpness": lambda image, x, filter, fill: ImageEnhance.Sharpness(image).enhance(x),
    "Rotate": lambda image, x, filter, fill: image.rotate(x, filter, fillcolor=fill),
    "ShearX": lambda image, x, filter, fill: affine(image, (1, x, 0, 0, 1, 0), filter, fill),
    "ShearY": lambda image, x, filter, fill: affine(image, (1, 0, 0, x, 1, 0), filter, fill),
    "TranslateXRel": lambda image, x, filter, fill: affine(image, (1, 0, x * image.width, 0, 1, 0), filter, fill),
    "TranslateYRel": lambda image, x, filter, fill: affine(image, (1, 0, 0, 0, 1, x * image.height), filter, fill),
}


@pytest.fixture
def applied(monkeypatch):
    """Instead of being applied, operations are recorded: (name, argument, filter, fill)."""
    record = []

    def recorder(name):
        def op(image, argument, filter, fill):
            record.append((name, argument, filter, fill))
            return image

        return op

    monkeypatch.setattr(rand_augment, "OPS", {name: (recorder(name), at) for name, (_, at) in OPS.items()})
    return record


def augment_often(policy, count, **options):
    rng = np.random.default_rng(0)
    for _ in range(count):
        RandAugment(policy, FILL, **options).draw(rng)(RGB)


@pytest.mark.parametrize("name", OPS)
def test_arguments_are_timms(name):
    _, argument_at = OPS[name]
    for sign, expected in zip((1, -1), ARGUMENTS[name], strict=True):
        arguments = [argument_at(level, sign) for level in LEVELS]
        assert arguments == expected if name in WITHOUT_STRENGTH else arguments == pytest.approx(expected, rel=1e-12)
        assert [type(a) for a in arguments] == [type(a) for a in expected]


@pytest.mark.parametrize("name", OPS)
def test_operations_are_pillows_with_the_documented_argument(name):
    op, _ = OPS[name]
    oracle = ORACLES[name.removesuffix("Increasing")]
    changed = 0
    for argument in {*ARGUMENTS[name][0], *ARGUMENTS[name][1]}:
        for filter in (BILINEAR, BICUBIC):
            for image, fill in ((RGB, FILL), (GREY, 115)):
                result = op(image, argument, filter, FILL)
                assert (result.mode, result.size) == (image.mode, image.size)
                np.testing.assert_array_equal(result, oracle(image, argument, filter, fill))
                changed += result.tobytes() != image.tobytes()
    assert changed


def test_whole_pixels_are_moved_and_the_gap_has_the_fill_color():
    pixels = np.asarray(RGB)
    moved = np.asarray(OPS["TranslateXRel"][0](RGB, 0.25, BILINEAR, FILL))
    np.testing.assert_array_equal(moved[:, :30], pixels[:, 10:])
    assert (moved[:, 30:] == FILL).all()
    moved = np.asarray(OPS["TranslateYRel"][0](RGB, -0.1, BILINEAR, (7,)))
    np.testing.assert_array_equal(moved[3:], pixels[:-3])
    assert (moved[:3] == 7).all()


def test_no_bits_make_an_image_black():
    assert OPS["Posterize"][0](RGB, 0, BICUBIC, FILL).getextrema() == ((0, 0),) * 3


@pytest.mark.parametrize("increasing", [0, 1])
def test_the_operations_are_timms_15_equally_often(applied, increasing):
    augment_often(f"rand-n15-p1-inc{increasing}", 400)
    common = WITHOUT_STRENGTH | GEOMETRIC | {"SolarizeAdd"}
    counts = collections.Counter(name for name, *_ in applied)
    assert counts.keys() == common | {name + "Increasing" * increasing for name in INCREASING}
    assert sum(counts.values()) == 6000
    assert min(counts.values()) > 300  # of 400 expected; 5 standard deviations are 97
    assert max(counts.values()) < 500


@pytest.mark.parametrize(
    ("policy", "mean", "std"), [("rand", 1, 0.71), ("rand-n3-p0.2", 0.6, 0.7), ("rand-n4-p1", 4, 0)]
)
def test_layers_are_applied_with_their_probability(applied, policy, mean, std):
    augment_often(policy, 2000)
    assert len(applied) / 2000 == pytest.approx(mean, abs=5 * std / 2000**0.5 + 1e-9)


def test_levels_are_normal_and_cut_off(applied):
    augment_often("rand-m9-mstd0.5-n15-p1-inc1", 1000)
    levels = np.array([abs(x) / 0.03 for name, x, *_ in applied if name in ("ShearX", "ShearY")])
    inner = np.sort(levels[levels < 10])
    assert levels.max() == pytest.approx(10)
    assert (levels > 9.999).mean() == pytest.approx(0.0228, abs=0.017)  # mean + 2 standard deviations
    assert np.quantile(levels, [0.159, 0.5, 0.841]) == pytest.approx([8.5, 9, 9.5], abs=0.1)
    assert len(np.unique(inner)) == len(inner)


def test_levels_below_zero_are_zero(applied):
    augment_often("rand-m0-mstd1-n15-p1", 200)
    levels = np.array([abs(x) for name, x, *_ in applied if name == "Rotate"])
    assert (levels == 0).mean() == pytest.approx(0.5, abs=0.18)


def test_without_noise_the_level_is_fixed_and_signs_are_equally_frequent(applied):
    augment_often("rand-m5-n15-p1", 200)
    angles = [x for name, x, *_ in applied if name == "Rotate"]
    assert set(angles) == {15.0, -15.0}
    assert np.mean(np.sign(angles)) == pytest.approx(0, abs=5 / len(angles) ** 0.5)


def test_the_default_level_is_10(applied):
    augment_often("rand", 200)
    assert {abs(x) for name, x, *_ in applied if name == "Rotate"} == {30.0}


def test_filters_are_drawn_each_time_unless_one_is_given(applied):
    augment_often("rand-n15-p1", 100)
    filters = [filter for *_, filter, _ in applied]
    assert filters.count(BILINEAR) + filters.count(BICUBIC) == 1500
    assert 653 < filters.count(BICUBIC) < 847  # 5 standard deviations
    applied.clear()
    augment_often("rand-n15-p1", 20, interpolation="bicubic")
    assert {(filter, fill) for *_, filter, fill in applied} == {(BICUBIC, FILL)}


def test_one_draw_does_the_same_to_every_image():
    rng = np.random.default_rng(0)
    augment = RandAugment("rand-m9-mstd0.5-n3-inc1", FILL)
    before = RGB.tobytes()
    results = set()
    for _ in range(50):
        apply = augment.draw(rng)
        results.add(apply(RGB).tobytes())
        assert apply(RGB.copy()).tobytes() in results
        assert apply(RGB).tobytes() == apply(RGB).tobytes()
    assert len(results) > 35
    assert RGB.tobytes() == before


def test_draws_are_functions_of_the_generator():
    augment = RandAugment("rand-m9-mstd0.5-n4-p1-inc1", FILL)
    copy = pickle.loads(pickle.dumps(augment))
    results = [a.draw(np.random.default_rng(seed))(RGB).tobytes() for a in (augment, copy) for seed in (0, 1)]
    assert results[:2] == results[2:]
    assert results[0] != results[1]


def test_no_drawn_layer_leaves_the_image():
    assert RandAugment("rand-p0", FILL).draw(np.random.default_rng(0))(RGB) is RGB


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("augmix-m3", "rand_augment must begin with 'rand', such as 'rand-m9-mstd0.5-inc1', got 'augmix-m3'"),
        ("", "rand_augment must begin with 'rand'"),
        (
            "rand-m9-foo2",
            r"rand_augment has parts .*: m \(the level\), mstd .*, n .*, p .*, inc .*; got 'foo2' in ",
        ),
        ("rand-m", "rand_augment has parts .*; got 'm' in 'rand-m'"),
        ("rand-m9-", "rand_augment has parts .*; got '' in 'rand-m9-'"),
        ("rand-mstd0.5.1", "rand_augment has parts .*; got 'mstd0.5.1'"),
        ("rand-m9-m5", "rand_augment has m twice, got 'rand-m9-m5'"),
        ("rand-m11", r"rand_augment's m is the level, an integer from 0 to 10, got 'm11' in 'rand-m11'"),
        ("rand-m9.5", r"rand_augment's m is the level, an integer from 0 to 10, got 'm9.5'"),
        ("rand-mstd101", "rand_augment's mstd is "),
        ("rand-n0", "rand_augment's n is "),
        ("rand-p1.5", "rand_augment's p is "),
        ("rand-inc2", "rand_augment's inc is "),
    ],
)
def test_wrong_policies_are_refused(policy, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        RandAugment(policy, FILL)


@pytest.mark.parametrize("fill", [(), (1, 2), (1, 2, 256), (-1,)])
def test_wrong_colors_are_refused(fill):
    with pytest.raises(ValueError, match=r"^fill must be one or three integers from 0 to 255, got "):
        RandAugment("rand", fill)


def test_wrong_interpolations_are_refused():
    with pytest.raises(ValueError, match=r"^interpolation must be one of bilinear, bicubic, random, got 'nearest'"):
        RandAugment("rand", FILL, "nearest")
