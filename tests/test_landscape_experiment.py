import json

import numpy as np
import pytest

from experiments import landscape, main
from experiments.configs import landscape as landscape_config


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = tmp_path_factory.mktemp("landscape")
    config = landscape_config.get_config("smoke")
    config.run = ("backprop", "forward_16w8a")
    found = landscape.run(config, str(directory))
    assert json.loads((directory / "results.json").read_text()) == json.loads(
        json.dumps(found)
    )
    for name in ("contours", "surfaces", "quality"):
        picture = (directory / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
    return found


def test_each_arithmetic_has_its_landscape(results):
    assert set(results["landscapes"]) == {"float32", "16w8a"}
    for found in results["landscapes"].values():
        losses = np.array(found["losses"])
        assert losses.shape == (3, 3)
        assert np.isfinite(losses).all()
    # One plane for both, in which 16 bits differ little from floats.
    floats, integers = (results["landscapes"][x] for x in ("float32", "16w8a"))
    assert floats["first"] == integers["first"]
    np.testing.assert_allclose(floats["losses"], integers["losses"], rtol=0.05)


def test_the_runs_begin_at_the_origin_and_lie_inside(results):
    sides = results["landscapes"]["float32"]
    for path in results["paths"].values():
        # In 16 bits the start is rounded to the grid.
        np.testing.assert_allclose(path[0], [0, 0], atol=1e-2)
        for axis, side in enumerate(("first", "second")):
            places = [place[axis] for place in path]
            assert min(sides[side]) < min(places) <= max(places) < max(sides[side])


def test_the_rows_tell_of_the_gradient(results):
    assert "cosine" not in results["rows"]["backprop"][0]
    rows = results["rows"]["forward_16w8a"]
    assert [row["step"] for row in rows] == [0, 10, 20]
    for row in rows:
        assert 0 < row["cosine"] < 0.5  # two pairs in 25,866 dimensions
        assert 0 < row["effective_rank"] <= 1.001  # of two estimates
        assert 0 <= row["accuracy"] <= 1
    assert rows[-1]["moved_fraction"] > 0
    assert 0.5 < sum(results["explained"]) <= 1 + 1e-6


def test_the_launcher_finds_it():
    assert main._DRIVERS[landscape_config.get_config().driver] is landscape.run
