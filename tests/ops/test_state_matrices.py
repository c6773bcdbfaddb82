import jax
import numpy as np
import pytest
import scipy
from numpy.polynomial import Polynomial

from ssm_jax.ops import diagonalize, hippo, state_matrices

MEASURES = ["legs", "legt", "fourier"]
DIAGONAL = ["diag-lin", "diag-inv", "diag-inv2", "diag-quad", "diag-real", "diag-legs"]
n = np.arange(4)


def legendre(degree):
    """The shifted Legendre polynomial of norm 1 on [0, 1], positive at 1."""
    on_interval = scipy.special.legendre(degree)(np.poly1d([2, -1]))
    return Polynomial(on_interval.coeffs[::-1]) * np.sqrt(2 * degree + 1)


def coefficients(u, d_state):
    """Of u on [0, 1] in the Legendre basis."""
    products = [(u * legendre(degree)).integ() for degree in range(d_state)]
    return np.array([p(1.0) - p(0.0) for p in products])


@pytest.mark.parametrize("power", range(6))
def test_legs_remembers_the_whole_past_in_the_legendre_basis(power):
    """t c' = A c + B u holds the coefficients c of u on [0, t]; for u = t^k those are t^k c(1)."""
    A, B, _ = hippo("legs", 6)
    c = coefficients(Polynomial.basis(power), 6)
    np.testing.assert_allclose(A @ c + B, power * c, atol=1e-9)


@pytest.mark.parametrize("power", range(6))
def test_legt_remembers_a_window_in_the_legendre_basis(power):
    """c' = A c + B u holds the coefficients of u on [t-2, t], where those of u(t-2) follow from c."""
    A, B, _ = hippo("legt", 6)
    u = Polynomial.basis(power)(Polynomial([0.7 - 2.0, 2.0]))  # x -> u(t - 2 + 2 x) at t = 0.7
    np.testing.assert_allclose(A @ coefficients(u, 6) + B * u(1.0), coefficients(u.deriv() / 2, 6), atol=1e-9)


def test_fourier_rotates_at_multiples_of_pi_and_forgets_through_b():
    A, B, P = hippo("fourier", 6)
    np.testing.assert_allclose(B, [1, 0, 2**0.5, 0, 2**0.5, 0])
    np.testing.assert_array_equal(P, B[None])
    rotations = scipy.linalg.block_diag(*[[[0, -np.pi * k], [np.pi * k, 0]] for k in range(3)])
    np.testing.assert_allclose(A + np.outer(B, B), rotations, atol=1e-15)


@pytest.mark.parametrize("measure", MEASURES)
def test_hippo_is_skew_but_for_a_multiple_of_one_and_its_low_rank(measure):
    A, _, P = hippo(measure, 8)
    normal = A + P.T @ P
    real = normal[0, 0]
    np.testing.assert_allclose(normal + normal.T, 2 * real * np.eye(8), atol=1e-12)
    assert len(P) == (2 if measure == "legt" else 1)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("d_state", [2, 8, 64])
def test_modes_and_their_conjugates_are_the_dense_system(measure, d_state):
    A, B, P = hippo(measure, d_state)
    W, B_modes, P_modes, V = diagonalize(A, B, P)
    whole = lambda x: np.concatenate([x, x.conj()], axis=-1)  # noqa: E731
    U, p = whole(V), whole(P_modes)
    np.testing.assert_allclose(U.conj().T @ U, np.eye(d_state), atol=1e-12)
    np.testing.assert_allclose(U @ (np.diag(whole(W)) - p.T @ p.conj()) @ U.conj().T, A, atol=1e-10)
    np.testing.assert_allclose(U @ whole(B_modes), B, atol=1e-12)
    assert (W.imag <= 0).all()
    assert (np.diff(W.imag) >= 0).all()


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("d_state", [8, 16, 64])
def test_modes_agree_with_the_official_ones(shared, measure, d_state):
    """Up to the phase of each eigenvector. The official Fourier system was rounded to float32 on its way."""
    with np.load(shared / "golden/s4nd/init_tables.npz") as tables:
        W, P, B = (tables[f"nplr/{measure}/N{d_state}/f64/{name}"] for name in "WPB")
    ours_W, ours_B, ours_P, _ = diagonalize(*hippo(measure, d_state))
    tolerance = 1e-6 if measure == "fourier" else 1e-9
    np.testing.assert_allclose(ours_W, W, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(np.abs(ours_P), np.abs(P), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(np.minimum(np.abs(ours_B), 2), np.minimum(np.abs(B), 2), rtol=tolerance, atol=tolerance)
    whole = np.abs(ours_B) < 2 - 1e-6
    assert whole.any()
    ours, official = (b * p.conj() for b, p in [(ours_B, ours_P), (B, P)])
    np.testing.assert_allclose(ours[:, whole], official[:, whole], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("measure", MEASURES)
def test_hippo_agrees_with_the_official_matrices(shared, measure):
    A, B, _ = hippo(measure, 8)
    with np.load(shared / "golden/s4nd/init_tables.npz") as tables:
        np.testing.assert_allclose(A, tables[f"transition/{measure}/A"], atol=1e-6 if measure == "fourier" else 1e-12)
        np.testing.assert_allclose(B[:, None], tables[f"transition/{measure}/B"], atol=1e-6)


@pytest.mark.parametrize("init", DIAGONAL)
@pytest.mark.parametrize("d_state", [8, 64])
def test_diagonal_inits_agree_with_the_official_ones(shared, init, d_state):
    ours = state_matrices(init, d_state)
    with np.load(shared / "golden/s4nd/init_tables.npz") as tables:
        A, B = (tables[f"diag/{init}/N{d_state}/{name}"] for name in "AB")
    np.testing.assert_allclose(ours.A, A, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(np.abs(ours.B), np.abs(B), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("init", "A"),
    [
        ("diag-lin", -0.5 - 1j * np.pi * n),
        ("diag-inv", -0.5 - 8j / np.pi * (8 / (2 * n + 1) - 1)),
        ("diag-inv2", -0.5 - 8j / np.pi * (8 / (n + 1) - 1)),
        ("diag-quad", -0.5 - 1j / np.pi * (2 * n + 1) ** 2),
        ("diag-real", -1.0 - n),
    ],
)
def test_diagonal_inits_follow_their_formulas(init, A):
    start = state_matrices(init, 8)
    np.testing.assert_allclose(start.A, A[None])
    np.testing.assert_array_equal(start.B, np.ones((1, 4)))
    np.testing.assert_array_equal(start.P, np.zeros((1, 1, 4)))


def test_diag_inv_approximates_the_frequencies_of_legs():
    legs, inv = state_matrices("legs", 64).A.imag[0], state_matrices("diag-inv", 64).A.imag[0]
    np.testing.assert_allclose(inv[:8], legs[:8], rtol=0.2)


def test_diag_legs_is_legs_without_low_rank():
    legs, diagonal = state_matrices("legs", 16), state_matrices("diag-legs", 16)
    np.testing.assert_allclose(diagonal.A, legs.A, rtol=1e-12)


@pytest.mark.parametrize(("init", "options"), [("dplr-legs", {}), ("dplr-lin", {"B_init": "legs"})])
def test_low_rank_part_is_that_of_legs_where_the_input_is(init, options):
    legs, start = state_matrices("legs", 16), state_matrices(init, 16, **options)
    np.testing.assert_array_equal(start.B, legs.B)
    np.testing.assert_array_equal(start.P, legs.P)


def test_large_inputs_of_legs_are_clipped():
    """11 of 32 modes have |B| up to 41; S4D would otherwise hear only the largest."""
    _, B, _, _ = diagonalize(*hippo("legs", 64))
    clipped = state_matrices("legs", 64).B[0]
    assert np.abs(B).max() > 40
    assert np.sum(np.abs(B) > 2) == 11
    np.testing.assert_allclose(np.abs(clipped), np.minimum(np.abs(B), 2), rtol=1e-4)


@pytest.mark.parametrize("init", [*DIAGONAL, *MEASURES, "hippo", "diag-rand"])
def test_every_init_is_stable_and_of_the_same_shapes(init):
    start = state_matrices(init, 8, n_ssm=4, key=jax.random.key(0))
    assert start.A.shape == start.B.shape == start.P.shape[1:] == (4, 4)
    assert (start.A.real <= 0).all()
    assert (start.A.imag <= 0).all()


def test_hippo_is_half_legs_and_half_fourier():
    both, legs, fourier = (state_matrices(init, 8, n_ssm=4) for init in ("hippo", "legs", "fourier"))
    for ours, first, second in zip(both, legs, fourier, strict=True):
        axis = ours.ndim - 2
        expected = np.concatenate([np.split(first, 2, axis)[0], np.split(second, 2, axis)[0]], axis)
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(
    ("init", "names"),
    [("diag", ["diag-inv", "diag-lin"]), ("all", ["legs", "fourier", "diag-inv", "diag-lin"])],
)
def test_combinations_are_equal_parts_of_their_inits(init, names):
    together = state_matrices(init, 8, n_ssm=2 * len(names))
    for i, name in enumerate(names):
        for ours, alone in zip(together, state_matrices(name, 8, n_ssm=2), strict=True):
            np.testing.assert_array_equal(ours[..., 2 * i : 2 * i + 2, :], alone)


def test_scales_multiply_the_parts():
    plain, scaled = (
        state_matrices("dplr-inv", 8, rank=2, key=jax.random.key(0), **options)
        for options in ({}, {"real_scale": 3.0, "imag_scale": 0.5, "B_scale": 5.0, "P_scale": 7.0})
    )
    np.testing.assert_allclose(scaled.A, 3 * plain.A.real + 0.5j * plain.A.imag)
    np.testing.assert_allclose(scaled.B, 5 * plain.B)
    np.testing.assert_allclose(scaled.P, 7 * plain.P, rtol=1e-6)
    assert scaled.P.shape == (2, 1, 4)


def test_random_parts_are_uniform():
    start = state_matrices("diag-lin", 4000, key=jax.random.key(0), real_random=True, imag_random=True)
    for uniform in (-start.A.real, -start.A.imag / (np.pi * 2000)):
        assert 0 <= uniform.min() < 0.01
        assert 0.99 < uniform.max() <= 1
        assert uniform.mean() == pytest.approx(0.5, abs=5 * (1 / 12 / 2000) ** 0.5)


@pytest.mark.parametrize(
    ("B_init", "B"),
    [
        ("alternating", [1, -1, 1, -1]),
        ("unit-cw", np.exp(-2j * np.pi * np.arange(4) / 8)),
        ("unit-ccw", np.exp(2j * np.pi * np.arange(4) / 8)),
        ("legs", state_matrices("legs", 8).B[0]),
    ],
)
def test_inputs_follow_their_formulas(B_init, B):
    np.testing.assert_allclose(state_matrices("diag-lin", 8, B_init=B_init).B, np.array(B)[None], atol=1e-12)


def test_random_inputs_have_variance_one():
    B = np.asarray(state_matrices("diag-lin", 8000, key=jax.random.key(0), B_init="random").B)
    assert np.mean(np.abs(B) ** 2) == pytest.approx(1, abs=5 / 4000**0.5)
    assert np.abs(np.mean(B)) < 5 / 4000**0.5


def test_random_frequencies_are_log_normal():
    A = state_matrices("diag-rand", 2000, n_ssm=4, key=jax.random.key(0)).A
    np.testing.assert_array_equal(A.real, -0.5)
    log_frequency = np.log(-A.imag)
    assert log_frequency.mean() == pytest.approx(0.0, abs=5 / 4000**0.5)
    assert log_frequency.std() == pytest.approx(1.0, abs=5 / 8000**0.5)


def test_random_frequencies_are_those_of_the_key():
    first, same, other = (state_matrices("diag-rand", 8, key=jax.random.key(seed)).A for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert (first != other).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init": "legs", "d_state": 7}, "d_state must be even .* got 7; use 8"),
        ({"init": "legs", "d_state": 0}, "d_state must be even and at least 2.* use 2"),
        ({"init": "legs", "d_state": 8, "n_ssm": 0}, "n_ssm must be a positive multiple of 1 .*, got 0"),
        ({"init": "hippo", "d_state": 8, "n_ssm": 3}, "n_ssm must be a positive multiple of 2 for init='hippo', got 3"),
        ({"init": "diag-rand", "d_state": 8}, "key must be given for an init with random parts"),
        ({"init": "diag-lin", "d_state": 8, "imag_random": True}, "key must be given for an init with random parts"),
        ({"init": "diag-lin", "d_state": 8, "B_init": "one"}, "B_init must be one of constant.*, got 'one'"),
        ({"init": "diag-lin", "d_state": 8, "scale": 2.0}, "options of init='diag-lin' are real_scale, .*; got scale"),
        ({"init": "legs", "d_state": 8, "B_scale": 2.0}, "init='legs' has no options, only .*; got B_scale"),
        ({"init": "all", "d_state": 8, "n_ssm": 6}, "n_ssm must be a positive multiple of 4 for init='all', got 6"),
        (
            {"init": "diag_lin", "d_state": 8},
            "init must be one of .*diag-rand.*got 'diag_lin'. Did you mean 'diag-lin'",
        ),
        ({"init": "zzz", "d_state": 8}, "init must be one of .*hippo.*got 'zzz'.$"),
    ],
)
def test_impossible_arguments_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        state_matrices(**arguments)


def test_unknown_measure_is_rejected():
    with pytest.raises(ValueError, match="measure must be 'legs', 'legt' or 'fourier', got 'lagt'"):
        hippo("lagt", 8)
