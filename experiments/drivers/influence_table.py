"""Wrong labels, found by the influence of training examples; and who taught what."""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import rich
from matplotlib import figure
from ml_collections import ConfigDict
from scipy import stats

from experiments import registry
from experiments.data.arrays import Split
from experiments.drivers import settings
from experiments.drivers.progress import show_progress
from experiments.learners.classification import Classification
from experiments.learners.learner import Learner, TrainState, make_learner
from experiments.workdir import report, runs
from fgrad import analysis

mpl.use("Agg")

_EXACT, _HEAD, _LOSS = "all weights, backpropagation", "head, exact", "the loss alone"
_SHOWN = 4  # proponents, and opponents, of each test example of the picture


class Checkpoint(NamedTuple):
    """What is kept of a run.

    Attributes:
      state: of the run.
      rate: learning rate of the step that followed.
      number: of the checkpoint; each has its own directions.
    """

    state: TrainState
    rate: float
    number: int


class Found(NamedTuple):
    """What the influence of one run says.

    Attributes:
      own: by kind of trace, the influence of each training example on itself.
      on_tests: by kind, that on the losses of test examples, [tests, examples].
    """

    own: dict[str, np.ndarray]
    on_tests: dict[str, np.ndarray]


def run(config: ConfigDict, workdir: str, resume: bool = True) -> dict[str, Any]:
    """Trains on partly wrong labels, and looks for them by influence.

    Args:
      config: see ``configs/influence.py``.
      workdir: results.json, table.md and examples.png go here.
      resume: there is nothing to go on from.

    Returns:
      What results.json holds: by kind of trace the recall at each share of examples
      that are checked, and the rank correlations, each as a list over seeds.

    Raises:
      UsageError: for a configuration that cannot be followed.
      InUseError, UsageError: as `experiments.workdir.runs.owned`.
    """
    settings.check_influence(config)
    directory = pathlib.Path(workdir)
    with runs.owned(directory, config, resume), show_progress() as progress:
        progress.expect(len(config.seeds) * config.method.steps)
        data = registry.load(config, config.domain, directory)
        rows: dict[str, dict[str, list[float]]] = {}
        for seed in config.seeds:
            train, wrong = _flipped(data["train"], config.flipped, seed)
            learner, checkpoints = _trained(config, train, seed, progress.advance)
            tests = jax.tree.map(lambda x: x[: config.tests], data["test"])
            found = _influences(config, learner, checkpoints, train, tests, seed)
            for kind, values in _scores(config, found, wrong).items():
                for name, value in values.items():
                    rows.setdefault(kind, {}).setdefault(name, []).append(value)
            if seed == config.seeds[0]:
                _draw(found.on_tests, train, wrong, tests, directory)
    report.write_json(rows, directory)
    _write(config, rows, directory)
    rich.print(f"Written to {directory}: results.json, table.md, examples.png")
    return rows


def _flipped(split: Split, share: float, seed: int) -> tuple[Split, np.ndarray]:
    """A split with some labels replaced by others, and which ones: bool [examples]."""
    rng = np.random.default_rng(seed)
    labels = np.array(split.labels)
    classes = int(labels.max()) + 1
    wrong = np.zeros(len(labels), bool)
    wrong[rng.choice(len(labels), round(share * len(labels)), replace=False)] = True
    shifts = rng.integers(1, classes, len(labels))
    labels = np.where(wrong, (labels + shifts) % classes, labels)
    return split._replace(labels=jnp.asarray(labels, jnp.int32)), wrong


def _trained(
    config: ConfigDict, train: Split, seed: int, progress: Callable[[int], None]
) -> tuple[Learner, list[Checkpoint]]:
    """Trains a network, and keeps it in the middle of each part of the run."""
    method = config.method
    network = functools.partial(
        registry.NETWORKS[config.network], num_classes=int(train.labels.max()) + 1
    )
    learner = make_learner(method, network, Classification(method))
    key = jax.random.key(seed)
    params = jax.jit(network(bits=None).init)(key, train.images[:1])["params"]
    state = learner.init(params, train.images[:1], seed)
    step = jax.jit(learner.step)
    rate, steps = jnp.float32(method.learning_rate), jnp.float32(method.steps)
    middles = (np.arange(config.checkpoints) + 0.5) * method.steps / config.checkpoints
    checkpoints: list[Checkpoint] = []
    for count in range(method.steps):
        if count in middles.astype(int):
            at = method.learning_rate * (1 - count / method.steps)
            checkpoints.append(Checkpoint(state, at, len(checkpoints)))
        state = step(state, rate, steps, train)
    progress(method.steps)
    return learner, checkpoints


def _influences(
    config: ConfigDict,
    learner: Learner,
    checkpoints: Sequence[Checkpoint],
    train: Split,
    tests: Split,
    seed: int,
) -> Found:
    """Adds up the influences over the checkpoints, by every kind of trace."""
    functions = _Traces(config, learner)
    own: dict[str, np.ndarray] = {}
    on_tests: dict[str, np.ndarray] = {}
    for checkpoint in checkpoints:
        kinds = [functions(checkpoint, split, seed) for split in (train, tests)]
        for kind in kinds[0]:
            a, b = (traces[kind] for traces in kinds)
            value = analysis.self_influence([a], [checkpoint.rate])
            own[kind] = own.get(kind, 0) + np.asarray(value)
            product = analysis.influence([b], [a], [checkpoint.rate])
            on_tests[kind] = on_tests.get(kind, 0) + np.asarray(product)
        losses = functions.losses(checkpoint.state, train)
        own[_LOSS] = own.get(_LOSS, 0) + np.asarray(losses)
    return Found(own, on_tests)


class _Traces:
    """The traces of examples at a checkpoint, of every kind."""

    def __init__(self, config: ConfigDict, learner: Learner) -> None:
        """Compiles the functions once for all checkpoints."""
        self._config = config
        self.losses = jax.jit(lambda state, split: _losses(learner, state)(split))

        def forward(state: TrainState, split: Split, key: Any, step: Any) -> jax.Array:
            def losses_fn(params: Any, split: Split) -> jax.Array:
                return _losses(learner, state._replace(params=params))(split)

            return analysis.forward_traces(
                losses_fn,
                state.params,
                key,
                step=step,
                epsilon=config.epsilon,
                num_perturbations=config.directions[-1],
                split=split,
            )

        def head(state: TrainState, split: Split) -> jax.Array:
            def losses_fn(params: Any, split: Split) -> jax.Array:
                return _losses(learner, state._replace(params=params))(split)

            return analysis.head_traces(
                losses_fn, state.params, config.head, split=split
            )

        def exact(state: TrainState, split: Split) -> jax.Array:
            def loss_fn(params: Any, one: Split) -> jax.Array:
                batch = jax.tree.map(lambda x: x[None], one)
                return _losses(learner, state._replace(params=params))(batch)[0]

            found = jax.vmap(jax.grad(loss_fn), (None, 0))(state.params, split)
            leaves = [x.reshape(len(split.labels), -1) for x in jax.tree.leaves(found)]
            return jnp.concatenate(leaves, axis=1)

        self._forward, self._head = jax.jit(forward), jax.jit(head)
        self._exact = jax.jit(exact)

    def __call__(
        self, checkpoint: Checkpoint, split: Split, seed: int
    ) -> dict[str, jax.Array]:
        """Traces [examples, n] by their kind."""
        state, most = checkpoint.state, self._config.directions[-1]
        key = jax.random.key(1000 + seed)
        slopes = self._forward(state, split, key, checkpoint.number)
        found = {
            # The first m of all directions are the m directions of that key.
            _forward_kind(m): slopes[:, :m] * (most / m) ** 0.5
            for m in self._config.directions
        }
        for kind, function in ((_HEAD, self._head), (_EXACT, self._exact)):
            parts = [
                function(
                    state, jax.tree.map(lambda x, i=i: x[i : i + self._chunk], split)
                )
                for i in range(0, len(split.labels), self._chunk)
            ]
            found[kind] = jnp.concatenate(parts)
        return found

    @property
    def _chunk(self) -> int:
        return int(self._config.chunk)


def _losses(learner: Learner, state: TrainState) -> Callable[[Split], jax.Array]:
    """The loss of each example by the weights of a state."""
    return lambda split: learner.losses_fn(
        state.params, state.frozen, state.scales, split
    )


def _forward_kind(m: int) -> str:
    return f"forward, m = {m}"


def _scores(
    config: ConfigDict, found: Found, wrong: np.ndarray
) -> dict[str, dict[str, float]]:
    """Recalls and rank correlations of each kind of trace."""
    scores: dict[str, dict[str, float]] = {}
    for kind, values in found.own.items():
        order = np.argsort(-values)
        scores[kind] = {
            f"recall at {share:.0%}": float(
                wrong[order[: round(share * len(wrong))]].sum() / wrong.sum()
            )
            for share in config.checked
        }
        exact = found.own[_EXACT]
        scores[kind]["self"] = float(stats.spearmanr(values, exact).statistic)
        if kind in found.on_tests:
            pairs = zip(found.on_tests[kind], found.on_tests[_EXACT], strict=True)
            scores[kind]["tests"] = float(
                np.mean([stats.spearmanr(*pair).statistic for pair in pairs])
            )
    return scores


def _write(
    config: ConfigDict,
    rows: Mapping[str, Mapping[str, list[float]]],
    directory: pathlib.Path,
) -> None:
    passes = {_forward_kind(m): 2 * m for m in config.directions}
    passes |= {_HEAD: 1, _LOSS: 1, _EXACT: 3}
    recalls = [f"recall at {share:.0%}" for share in config.checked]
    cells = []
    for kind in sorted(rows, key=lambda kind: (passes[kind], kind)):
        cells.append([kind, f"{passes[kind]}"])
        for name in (*recalls, "self", "tests"):
            percent = 100 if name in recalls else 1
            cells[-1].append(_spread(rows[kind].get(name), percent))
    note = (
        f"{config.dataset} {config.domain}, {config.flipped:.0%} of the labels wrong, "
        f"{config.checkpoints} checkpoints; recall in %: the share of the wrong "
        "labels among the examples that are checked first; self, tests: rank "
        "correlation with backpropagation of the influence of examples on themselves "
        f"and on the losses of {config.tests} test examples; "
        f"{report.spread(len(config.seeds))}; passes: forward passes for each example "
        "and checkpoint, a backward pass counting as two."
    )
    columns = ("influence by", "passes", *recalls, "self", "tests")
    report.write_table(columns, cells, note, directory, wide=2)


def _spread(values: Sequence[float] | None, percent: int) -> str:
    """Mean and deviation; the mean alone of one seed."""
    if values is None:
        return ""
    digits = 1 if percent == 100 else 2
    mean = f"{percent * np.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {percent * np.std(values, ddof=1):.{digits}f}"


def _draw(
    on_tests: Mapping[str, np.ndarray],
    train: Split,
    wrong: np.ndarray,
    tests: Split,
    directory: pathlib.Path,
) -> None:
    """Draws test examples and who spoke for and against them, by the head's traces."""
    products = on_tests[_HEAD]
    # Those that the training set taught least, all in all, have the most to tell.
    chosen = np.argsort(products.sum(axis=1))[:3]
    columns = 1 + 2 * _SHOWN
    fig = figure.Figure(
        figsize=(1.1 * columns, 1.5 * len(chosen)), layout="constrained"
    )
    for panels, test in zip(
        fig.subplots(len(chosen), columns, squeeze=False), chosen, strict=True
    ):
        order = np.argsort(-products[test])
        shown = [*order[:_SHOWN], *order[: -_SHOWN - 1 : -1]]
        _picture(panels[0], tests, test, "test")
        for place, index in enumerate(shown):
            kind = "for" if place < _SHOWN else "against"
            title = f"{kind}{' (wrong)' if wrong[index] else ''}"
            _picture(panels[1 + place], train, index, title)
    fig.savefig(directory / "examples.png", dpi=100)


def _picture(axes: Any, split: Split, index: int, title: str) -> None:
    axes.imshow(split.images[index, ..., 0], cmap="gray_r")
    axes.set_title(f"{title}: {int(split.labels[index])}", fontsize=8)
    axes.set_axis_off()
