"""Steps of a run, predicted before it: against the run, in words, in the launcher."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import fast_jit
from rich import console

from experiments.configs import quickstart
from experiments.data.arrays import Split
from experiments.drivers import progress, training
from experiments.learners import predicted_time
from experiments.learners.classification import Classification
from experiments.learners.learner import make_learner
from experiments.models import linear
from experiments.usage import UsageError

NETWORK = functools.partial(linear.Linear, num_classes=2)
QUESTION = predicted_time.Question(share=0.6, directions=600, examples=64)
METHODS = {
    "backprop": {"batch_size": 32},
    "forward_fp32": {"batch_size": 32, "num_perturbations": 8, "estimator": "spsa"},
    "forward_16w8a": {"batch_size": 32, "num_perturbations": 8},
}


@pytest.fixture(scope="module")
def split():
    x = jax.random.normal(jax.random.key(0), (64, 6))
    return Split(x, (x[:, 0] + 0.3 * x[:, 1] > 0).astype(jnp.int32))


@pytest.mark.parametrize("name", METHODS)
def test_it_is_what_the_run_takes_of_a_network_that_is_linear(name, split):
    rate, steps = (0.01, 120) if name == "backprop" else (0.05, 120)
    method = quickstart.changed(quickstart.base().methods[name], METHODS[name])
    learner = make_learner(method, NETWORK, Classification(method))
    params = NETWORK().init(jax.random.key(1), split.images)["params"]
    state = learner.init(params, split.images, 0)
    found = predicted_time.predicted_steps(learner, state, split, rate, steps, QUESTION)
    step = fast_jit(learner.step)
    loss = fast_jit(
        lambda state: learner.loss_fn(state.params, state.frozen, state.scales, split)
    )
    losses = [loss(state)]
    while losses[-1] > QUESTION.share * losses[0]:
        state = step(state, jnp.float32(rate), jnp.float32(steps), split)
        losses.append(loss(state))
        assert len(losses) <= steps
    taken = len(losses) - 1
    assert taken > 10
    assert found == pytest.approx(taken, rel=0.3)
    few = predicted_time.predicted_steps(learner, state, split, rate, 2, QUESTION)
    assert few is None


def test_it_is_asked_of_methods_that_train_by_plain_steps_only():
    config = quickstart.get_config()
    names = {
        name
        for name, method in config.methods.items()
        if predicted_time.can_be_predicted(method)
    }
    assert names == {
        *("backprop", "backprop_checkpoints", "backprop_sampled"),
        *("forward_fp32", "forward_16w8a", "forward_8w8a"),
    }
    guided = {"enhancements": {"momentum_guided_sampling": {}}}
    method = quickstart.changed(config.methods.forward_fp32, guided)
    assert not predicted_time.can_be_predicted(method)


def test_a_question_without_a_meaning_is_refused():
    settings = {"share": 0.5, "directions": 4, "examples": 8}
    assert predicted_time.Question.of({}) is None
    assert predicted_time.Question.of({**settings, "share": 0.0}) is None
    assert predicted_time.Question.of(settings) == predicted_time.Question(**settings)
    with pytest.raises(UsageError, match=r"in \[0, 1\), 0 for no estimate, got 1.5"):
        predicted_time.Question.of({**settings, "share": 1.5})
    with pytest.raises(UsageError, match="at least 1, got 0 and 8"):
        predicted_time.Question.of({**settings, "directions": 0})


def test_a_note_is_shown_beside_a_bar_as_well(monkeypatch, capsys):
    with progress.show_progress() as shown:
        shown.note("about 1,900 steps")
    assert "about 1,900 steps" in capsys.readouterr().out
    terminal = console.Console(force_terminal=True, width=80)
    monkeypatch.setattr(progress.rich, "get_console", lambda: terminal)
    with progress.show_progress() as shown:
        shown.say("finished")
        shown.note("about 1,900 steps")
    assert "about 1,900 steps" in (out := capsys.readouterr().out)
    assert "finished" not in out


@pytest.mark.slow
def test_the_launcher_tells_it_and_keeps_it(tmp_path, capsys):
    config = quickstart.base("smoke")
    config.network, config.seeds, config.run = "mlp_small", (0,), ("backprop",)
    config.estimate.share, config.estimate.directions = 0.9, 64
    result = training.run(config, str(tmp_path))["backprop"]
    predicted, steps = result["predicted_steps"], config.methods.backprop.steps
    assert predicted is None or 1 <= predicted <= steps
    lines = capsys.readouterr().out.splitlines()
    (line,) = (x for x in lines if "until the loss is down to 0.9" in x)
    number = f"more than its {steps}" if predicted is None else f"about {predicted}"
    assert f"backprop: {number}" in line
    assert np.isfinite(result["accuracy"])
