import json

import numpy as np
import pytest

from experiments import main
from experiments.configs import landscape as landscape_config
from experiments.drivers import landscape_figures


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = tmp_path_factory.mktemp("landscape")
    config = landscape_config.get_config("smoke")
    config.run = ("backprop", "forward_16w8a")
    found = landscape_figures.run(config, str(directory))
    assert json.loads((directory / "results.json").read_text()) == json.loads(
        json.dumps(found)
    )
    for name in ("contours", "surfaces", "quality"):
        picture = (directory / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
    return found


@pytest.mark.slow
def test_a_picture_has_the_losses_of_its_arithmetic(results):
    (found,) = results["landscapes"].values()
    losses = np.array(found["losses"])
    assert losses.shape == (3, 3)
    assert np.isfinite(losses).all()


def test_the_runs_begin_at_the_origin_and_lie_inside(results):
    sides, paths = (results[key]["forward_16w8a"] for key in ("landscapes", "paths"))
    for path in paths.values():
        # In 16 bits the start is rounded to the grid.
        np.testing.assert_allclose(path[0], [0, 0], atol=1e-2)
        for axis, side in enumerate(("first", "second")):
            places = [place[axis] for place in path]
            assert min(sides[side]) < min(places) <= max(places) < max(sides[side])
    # Backpropagation ends on the first axis.
    assert paths["backprop"][-1][0] > 0
    assert abs(paths["backprop"][-1][1]) < 1e-3


def test_the_rows_tell_of_the_gradient(results):
    assert "cosine" not in results["rows"]["backprop"][0]
    rows = results["rows"]["forward_16w8a"]
    assert [row["step"] for row in rows] == [0, 10, 20]
    for row in rows:
        assert 0 < row["cosine"] < 0.5  # two pairs in 25,866 dimensions
        assert 0 < row["effective_rank"] <= 1.001  # of two estimates
        assert 0 <= row["accuracy"] <= 1
    assert rows[-1]["moved_fraction"] > 0


def test_the_launcher_finds_it():
    assert main._DRIVERS[landscape_config.get_config().driver] is landscape_figures.run
