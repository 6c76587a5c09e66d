"""The table of influence: a smoke run, and what it counts."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import main
from experiments.configs import influence as influence_config
from experiments.data.arrays import Split
from experiments.drivers import influence_table
from experiments.usage import UsageError


@pytest.mark.slow
def test_a_smoke_run_fills_the_table(tmp_path):
    config = influence_config.get_config("smoke")
    rows = influence_table.run(config, str(tmp_path))
    assert json.loads((tmp_path / "results.json").read_text()) == rows
    assert (tmp_path / "examples.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "table.md").read_text()
    for kind in ("forward, m = 4", "head, exact", "the loss alone"):
        assert kind in rows
        assert kind in table
    assert "±" not in table
    assert "of one seed" in table
    exact = rows["all weights, backpropagation"]
    assert exact["self"] == exact["tests"] == [pytest.approx(1)]
    # After 20 steps the head's own part dominates.
    assert rows["head, exact"]["self"][0] > 0.8
    assert main._DRIVERS[config.driver] is influence_table.run


def test_flipped_labels_are_others_and_as_many_as_asked_for():
    labels = jnp.arange(200) % 7
    split = Split(jnp.zeros((200, 1)), labels)
    flipped, wrong = influence_table._flipped(split, 0.1, seed=3)
    assert wrong.sum() == 20
    np.testing.assert_array_equal(flipped.labels != labels, wrong)
    assert set(np.asarray(flipped.labels)) <= set(range(7))
    assert (influence_table._flipped(split, 0.1, seed=4)[1] != wrong).any()


def test_recall_counts_the_wrong_among_those_checked():
    config = influence_config.get_config("smoke")
    config.checked = (0.2, 0.4)
    wrong = np.array([True, True, False, False, False, True, False, False, False, True])
    values = np.array([9.0, 1.0, 8.0, 2.0, 3.0, 7.0, 0.5, 0.4, 0.3, 6.0])
    exact = {influence_table._EXACT: values}
    found = influence_table.Found(own=exact, on_tests={})
    scores = influence_table._scores(config, found, wrong)[influence_table._EXACT]
    assert scores["recall at 20%"] == 1 / 4
    assert scores["recall at 40%"] == 3 / 4


def test_settings_are_checked_before_any_work(tmp_path):
    for field, value, message in (
        ("flipped", 1.5, "between 0 and 1, got 1.5"),
        ("checkpoints", 21, "1 to 20"),
        ("network", "cnn_29", "cnn_29"),
        ("directions", (), "at least one"),
    ):
        config = influence_config.get_config("smoke")
        with config.ignore_type():
            config[field] = value
        with pytest.raises(UsageError, match=message):
            influence_table.run(config, str(tmp_path))
    with pytest.raises(ValueError, match="got 'fast'"):
        influence_config.get_config("fast")
