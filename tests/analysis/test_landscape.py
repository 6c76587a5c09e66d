import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

import fgrad
from fgrad import analysis
from fgrad.analysis import Directions, figures

matplotlib.use("agg")
from matplotlib import pyplot as plt

SIZE = 6
PARAMS = {"w": jnp.arange(12.0).reshape(4, 3) / 10 + 0.1, "b": jnp.ones(3)}


def quadratic():
    """A Hessian, and the loss ½ (w - c)ᵀ H (w - c) of a vector."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(SIZE, SIZE))
    hessian, centre = root @ root.T, rng.normal(size=SIZE)

    def loss_fn(params, centre):
        d = params["w"] - centre
        return 0.5 * d @ jnp.asarray(hessian, jnp.float32) @ d

    return hessian, centre, loss_fn


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_on_a_quadratic_it_is_the_closed_form(chunk):
    hessian, centre, loss_fn = quadratic()
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(2, SIZE))
    origin = rng.normal(size=SIZE)
    done = []
    found = analysis.loss_landscape(
        loss_fn,
        {"w": jnp.float32(origin)},
        Directions({"w": jnp.float32(first)}, {"w": jnp.float32(second)}),
        first=np.linspace(-2, 2, 5),
        second=np.linspace(-1, 1, 4),
        chunk=chunk,
        progress=done.append,
        centre=jnp.float32(centre),
    )
    assert found.losses.shape == (5, 4)
    assert sum(done) == 20
    for i, a in enumerate(np.linspace(-2, 2, 5)):
        for j, b in enumerate(np.linspace(-1, 1, 4)):
            d = origin + a * first + b * second - centre
            assert found.losses[i, j] == pytest.approx(0.5 * d @ hessian @ d, rel=1e-5)


def test_random_directions_are_as_long_as_the_filters():
    found = analysis.random_directions(jax.random.key(0), PARAMS)
    for direction in found[:2]:
        np.testing.assert_allclose(
            np.linalg.norm(direction["w"], axis=0),
            np.linalg.norm(PARAMS["w"], axis=0),
            rtol=1e-6,
        )
        assert not direction["b"].any()
    assert not np.allclose(found.first["w"], found.second["w"])
    again = analysis.random_directions(jax.random.key(0), PARAMS)
    np.testing.assert_array_equal(found.first["w"], again.first["w"])


def test_directions_of_a_plane_find_the_plane():
    rng = np.random.default_rng(0)
    a, b = np.linalg.qr(rng.normal(size=(20, 2)))[0].T
    centre = {"w": jnp.float32(rng.normal(size=20))}
    along = [(3.0, 0.5), (2.0, -0.5), (1.0, 0.25), (0.0, 0.0)]
    points = [{"w": centre["w"] + jnp.float32(x * a + y * b)} for x, y in along]
    found = analysis.trajectory_directions(points, centre)
    assert sum(found.explained) == pytest.approx(1, abs=1e-6)
    assert found.explained[0] > found.explained[1]
    places = analysis.coordinates(points, centre, found)
    for point, (x, y) in zip(points, places, strict=True):
        np.testing.assert_allclose(
            centre["w"] + x * found.first["w"] + y * found.second["w"],
            point["w"],
            atol=1e-5,
        )
    assert np.linalg.norm(found.first["w"]) == pytest.approx(1, abs=1e-5)
    assert found.first["w"] @ found.second["w"] == pytest.approx(0, abs=1e-5)


def test_principal_axes_are_those_of_the_singular_values():
    rng = np.random.default_rng(3)
    steps = rng.normal(size=(7, 30)) * np.linspace(2, 0.2, 30)
    points = [{"w": jnp.float32(s)} for s in steps]
    found = analysis.trajectory_directions(points, {"w": jnp.zeros(30)})
    _, values, axes = np.linalg.svd(steps)
    assert abs(found.first["w"] @ axes[0]) == pytest.approx(1, abs=1e-4)
    assert abs(found.second["w"] @ axes[1]) == pytest.approx(1, abs=1e-4)
    shares = values**2 / (values**2).sum()
    np.testing.assert_allclose(found.explained, shares[:2], rtol=1e-4)


def test_coordinates_of_directions_that_are_not_orthogonal():
    centre = {"w": jnp.ones(2)}
    directions = Directions({"w": jnp.array([2.0, 0.0])}, {"w": jnp.array([1.0, 1.0])})
    point = {"w": jnp.array([1 + 2 * 3 - 0.5, 1 - 0.5])}
    np.testing.assert_allclose(
        analysis.coordinates([point], centre, directions), [[3, -0.5]], rtol=1e-6
    )


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_integer_weights_move_on_their_grid(bits):
    params = fgrad.quantize(PARAMS, bits=bits)
    directions = analysis.random_directions(jax.random.key(0), params)

    def loss_fn(params, x):
        assert params["w"].bits == bits
        return jnp.mean((x @ fgrad.dequantize(params["w"])) ** 2)

    x = jax.random.normal(jax.random.key(1), (8, 4))
    coordinates = np.linspace(-1, 1, 3)
    found = analysis.loss_landscape(loss_fn, params, directions, first=coordinates, x=x)
    leaf = params["w"]
    for i, a in enumerate(coordinates):
        for j, b in enumerate(coordinates):
            step = a * directions.first["w"] + b * directions.second["w"]
            moved = np.rint(np.float64(step) / np.float64(leaf.scale))
            limit = 2 ** (bits - 1) - 1
            q = np.clip(np.float64(leaf.qvalue) + moved, -limit, limit)
            expected = np.mean((np.float64(x) @ (q * np.float64(leaf.scale))) ** 2)
            assert found.losses[i, j] == pytest.approx(expected, rel=1e-3)


def test_the_plane_through_three_points():
    rng = np.random.default_rng(5)
    center, a, b = ({"w": jnp.float32(x)} for x in rng.normal(size=(3, 9)))
    plane = analysis.plane_through(center, a, b)
    gram = [[x["w"] @ y["w"] for y in plane[:2]] for x in plane[:2]]
    np.testing.assert_allclose(gram, np.eye(2), atol=1e-5)
    places = analysis.coordinates([center, a, b], center, plane)
    assert places[1] == pytest.approx(
        [np.linalg.norm(a["w"] - center["w"]), 0], abs=1e-5
    )
    x, y = places[2]
    np.testing.assert_allclose(
        center["w"] + x * plane.first["w"] + y * plane.second["w"], b["w"], atol=1e-5
    )
    with pytest.raises(ValueError, match="on one line"):
        analysis.plane_through(center, a, a)


def test_a_point_between_and_outside_the_grid():
    axis = np.array([0.0, 1.0, 3.0])
    plane = 2 * axis[:, None] - axis[None]
    landscape = analysis.Landscape(axis, axis, plane)
    points = np.array([[2.0, 0.5], [4.0, 1.0]])
    np.testing.assert_allclose(figures.interpolated(landscape, points), [3.5, 5.0])


def test_figures_show_the_losses_and_the_paths():
    axis = np.linspace(-1, 1, 5)
    losses = np.float32(axis[:, None] ** 2 + axis[None] ** 2)
    losses[0, 0] = np.nan
    landscape = analysis.Landscape(axis, axis, losses)
    paths = {"run": np.array([[1.0, 1.0], [0.5, 0.0]])}
    figure = plt.figure()
    flat = figure.add_subplot(1, 2, 1)
    analysis.plot_contour(flat, landscape, paths)
    np.testing.assert_array_equal(flat.lines[0].get_xydata(), paths["run"])
    solid = figure.add_subplot(1, 2, 2, projection="3d")
    analysis.plot_surface(solid, landscape, paths)
    figure.canvas.draw()
    plt.close(figure)


def test_errors():
    directions = analysis.random_directions(jax.random.key(0), PARAMS)

    def loss_fn(params):
        return params["w"].sum()

    with pytest.raises(ValueError, match="chunk must be an integer from 1"):
        analysis.loss_landscape(loss_fn, PARAMS, directions, chunk=0)
    with pytest.raises(ValueError, match="structure and shapes"):
        analysis.loss_landscape(loss_fn, {"w": PARAMS["w"]}, directions)
    with pytest.raises(ValueError, match=r"must return a scalar, got shape \(4, 3\)"):
        analysis.loss_landscape(lambda params: params["w"], PARAMS, directions)
    with pytest.raises(ValueError, match="no leaf has two"):
        analysis.random_directions(jax.random.key(0), {"b": jnp.ones(3)})
    centre = {"w": jnp.zeros(3)}
    line = [{"w": jnp.array([1.0, 0, 0])}, {"w": jnp.array([2.0, 0, 0])}]
    with pytest.raises(ValueError, match="2 points of the trajectory lie on one line"):
        analysis.trajectory_directions(line, centre)
    with pytest.raises(ValueError, match="parallel"):
        analysis.coordinates(line, centre, Directions(*line))


def test_quality_of_known_estimates():
    gradient = {"w": jnp.array([3.0, 4.0])}

    def exact(key):
        return jax.tree.map(lambda g: 2 * g, gradient)

    found = analysis.gradient_quality(exact, gradient, jax.random.key(0))
    assert found.cosine == pytest.approx(1)
    assert found.relative_variance == pytest.approx(0)
    assert found.effective_rank == 0

    def orthogonal(key):
        return {"w": jnp.array([-4.0, 3.0])}

    found = analysis.gradient_quality(orthogonal, gradient, jax.random.key(0))
    assert found.cosine == pytest.approx(0, abs=1e-7)


def test_quality_of_noise_has_its_variance_and_rank():
    size, count = 400, 64
    gradient = {"a": jnp.full((size,), 0.5)}

    def estimate(key):
        return {"a": gradient["a"] + jax.random.normal(key, (size,))}

    found = analysis.gradient_quality(
        estimate, gradient, jax.random.key(0), num_estimates=count
    )
    # cos = |g|² / (|g| |ĝ|) with |g|² = 100 and |ĝ|² = 100 + 400.
    assert found.cosine == pytest.approx(np.sqrt(100 / 500), abs=0.02)
    assert found.mean_cosine == pytest.approx(np.sqrt(100 / (100 + 400 / 64)), abs=0.02)
    assert found.relative_variance == pytest.approx(400 / 106, rel=0.1)
    # Of n Gaussian vectors in p dimensions: about n p / (n + p).
    assert found.effective_rank == pytest.approx(63 * 400 / 463, rel=0.05)
    with pytest.raises(ValueError, match="integer from 2 to 1048576, got 1"):
        analysis.gradient_quality(
            estimate, gradient, jax.random.key(0), num_estimates=1
        )
