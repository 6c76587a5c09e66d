"""The tables of training time and of the equilibrium network: smoke runs."""

import json

import numpy as np
import pytest

from experiments import main
from experiments.configs import equilibrium as equilibrium_config
from experiments.configs import training_time as training_time_config
from experiments.drivers import equilibrium_table, training_time
from experiments.usage import UsageError


@pytest.mark.slow
def test_training_times_are_predicted_and_counted(tmp_path):
    config = training_time_config.get_config("smoke")
    config.targets = (0.999,)
    curves = training_time.run(config, str(tmp_path))
    assert json.loads((tmp_path / "results.json").read_text()) == curves
    for found in curves["digits_15"].values():
        assert set(found) == {"actual", "4"}
        (actual,), (predicted,) = found["actual"], found["4"]
        assert len(actual) == len(predicted) == config.steps + 1
        # Both begin at the loss of the network as it is.
        assert actual[0] == pytest.approx(predicted[0], rel=1e-5)
        assert actual[-1] != predicted[-1]
    assert "mean error" in (tmp_path / "table.md").read_text()
    assert main._DRIVERS[config.driver] is training_time.run


def test_steps_are_empty_where_a_run_does_not_get_there():
    assert training_time._steps([4.0, 3.0, 2.0, 1.0], 0.5) == 2
    assert np.isnan(training_time._steps([4.0, 3.0], 0.5))
    assert training_time._spread([2.0, float("nan")]) == ""
    assert training_time._spread([2.0, 4.0]) == "3 ± 1"
    assert training_time._percent([0.1, float("nan"), 0.3]) == "20%"
    assert training_time._percent([float("nan")]) == ""


@pytest.mark.slow
def test_an_equilibrium_network_is_adapted(tmp_path):
    config = equilibrium_config.get_config("smoke")
    config.run = ("phantom_1", "forward")
    results = equilibrium_table.run(config, str(tmp_path))
    assert json.loads((tmp_path / "results.json").read_text()) == results
    phantom, forward = (results[name] for name in config.run)
    assert 0.5 < phantom["cosine"][0] < 0.999
    assert forward["cosine"][0] < 0.5
    solve = forward["solver_steps"][0]
    assert 2 < solve < config.max_steps
    # 10 steps of 64 examples, m = 2.
    assert forward["cells"] == 10 * 64 * 2 * 2 * solve
    assert phantom["cells"] == 10 * 64 * (phantom["solver_steps"][0] + 3)
    assert main._DRIVERS[config.driver] is equilibrium_table.run


def test_settings_are_checked_before_any_work(tmp_path):
    config = training_time_config.get_config("smoke")
    config.targets = (1.5,)
    with pytest.raises(UsageError, match="shares of the first loss"):
        training_time.run(config, str(tmp_path))
    config = equilibrium_config.get_config("smoke")
    config.estimates = 1
    with pytest.raises(UsageError, match="at least 2, got 1"):
        equilibrium_table.run(config, str(tmp_path))
