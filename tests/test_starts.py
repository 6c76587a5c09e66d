"""The pre-trained network of the repository: whose it is, and who begins from it."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from sklearn import datasets

from experiments import starts
from experiments.configs import quickstart
from experiments.drivers import training
from experiments.learners import metrics
from experiments.models import cnn

# Of the 1,797 upright digits, of which it was trained on 1,078.
UPRIGHT = 1735


def correct() -> int:
    """How many upright digits the committed network recognises."""
    params = starts.committed(quickstart.get_config())
    images, labels = datasets.load_digits(return_X_y=True)
    images = np.float32(images).reshape(-1, 8, 8, 1) / 16
    logits = jax.jit(cnn.CNN().apply)({"params": params}, images)
    return round(metrics.scores(["accuracy"], logits, labels)["accuracy"] * len(labels))


def test_the_committed_network_is_the_quickstarts():
    params = starts.committed(quickstart.get_config())
    shapes = jax.eval_shape(cnn.CNN().init, jax.random.key(0), np.ones((1, 8, 8, 1)))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes["params"])
    assert correct() == UPRIGHT


@pytest.mark.slow
@pytest.mark.parametrize("instructions", ["SSE4_2", "AVX2"])
def test_it_recognises_the_same_digits_on_other_processors(instructions):
    here = os.path.dirname(__file__)
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_cpu_max_isa={instructions}",
        "PYTHONPATH": os.pathsep.join([here, os.path.dirname(here)]),
    }
    program = "import test_starts; print(test_starts.correct())"
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert result.stdout.split()[-1] == str(UPRIGHT)


def test_other_settings_pre_train_anew():
    changes = {
        "network": "linear",
        "source": "rotated_30",
        "pretrain.seed": 1,
        "pretrain.steps": 801,
        "pretrain.committed": False,
    }
    for name, value in changes.items():
        config = quickstart.get_config()
        config.update_from_flattened_dict({name: value})
        assert starts.committed(config) is None, name
    assert starts.committed(quickstart.get_config("smoke")) is None
    # What happens after the pre-training does not matter.
    config = quickstart.get_config()
    config.target, config.seeds = "rotated_45", (7,)
    assert starts.committed(config) is not None


def test_what_is_written_is_found_again(tmp_path, monkeypatch):
    config = quickstart.get_config("smoke")
    params = {"layer": {"kernel": np.float32([[0.1, -3.5]])}}
    starts.write(config, params, tmp_path)
    monkeypatch.setattr(starts, "FOLDER", tmp_path)
    found = starts.committed(config)
    np.testing.assert_array_equal(found["layer"]["kernel"], params["layer"]["kernel"])


def test_the_driver_begins_from_it(tmp_path):
    class Silent:
        steps, said = 0, ""

        def advance(self, steps):
            self.steps += steps

        def say(self, text):
            self.said += text

    config, progress = quickstart.get_config(), Silent()
    start = training.pretrain(config, None, None, progress, tmp_path)
    expected = starts.committed(config)
    jax.tree.map(np.testing.assert_array_equal, start, expected)
    assert progress.steps == config.pretrain.steps  # the bar goes on
    assert "experiments/models/starts" in progress.said
