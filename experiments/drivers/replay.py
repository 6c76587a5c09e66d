r"""Makes a run again from its losses, to the same bits.

    python -m experiments.main --config=experiments/configs/quickstart.py \
        --workdir=workdir/quickstart --replay=forward_16w8a/seed_0

The run was made with ``--config.loss_files=True``. Its replay evaluates no loss.
"""

import pathlib

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import fgrad
from experiments.drivers import training
from experiments.drivers.progress import show_progress
from experiments.learners.classification import Classification
from experiments.learners.learner import make_learner
from experiments.usage import UsageError
from experiments.workdir import runs


def run(config: ConfigDict, workdir: str, name: str) -> str:
    """Makes a run again, and prints whether it has the bits of the first time.

    Args:
      config: that of the run.
      workdir: where the run is.
      name: of the run, such as "forward_16w8a/seed_0".

    Returns:
      The line that was printed.

    Raises:
      UsageError: if there is no such run, or if it ends in other bits.
    """
    where = pathlib.Path(workdir) / "runs" / name
    method, _, of_seed = name.partition("/")
    directory = runs.RunDirectory(where, 0.0) if where.is_dir() else None
    result = directory.result() if directory else None
    seed = of_seed.removeprefix("seed_")
    if not (directory and result and method in config.methods and seed.isdecimal()):
        raise UsageError(
            f"{where} is no finished run of a seed; give one under runs, such as "
            "--replay=forward_16w8a/seed_0."
        )
    if not directory.losses_file.exists():
        raise UsageError(
            f"{where} has kept no losses: make the run with --config.loss_files=True, "
            'by a method of the gradient "forward".'
        )
    log = fgrad.RunLog.load(directory.losses_file)
    end = _replayed(config, pathlib.Path(workdir), method, int(seed), result, log)
    digest = runs.digest(end)
    size = directory.losses_file.stat().st_size
    text = (
        f"{name}: {len(log):,} steps again from {size:,} bytes; SHA-256 of parameters, "
        f"state and key {digest[:16]}"
    )
    if digest != result["digest"]:
        raise UsageError(f"{text}, and the run had {result['digest'][:16]}.")
    print(f"{text}, that of the run.")
    return text


def _replayed(
    config: ConfigDict,
    workdir: pathlib.Path,
    name: str,
    seed: int,
    result: dict,
    log: fgrad.RunLog,
) -> object:
    """The state after the last step of a log.

    Args:
      config: that of the run.
      workdir: where the data and the pre-trained network are.
      name: of the method.
      seed: of the run.
      result: what the run left.
      log: its losses.
    """
    with show_progress() as progress:
        progress.expect(config.pretrain.steps)
        task = training.prepare(config, workdir, progress)
    method = config.methods[name]
    learner = make_learner(method, task.network, Classification(method))
    images = task.target["train"].images[: method.get("calibration_images")]
    state = learner.init(task.start, images, seed)

    @jax.jit
    def step(state, rate, horizon, losses):
        return learner.step(state, rate, horizon, None, losses)

    rate, horizon = jnp.float32(result["learning_rate"]), jnp.float32(len(log))
    for losses in log.losses:
        state = step(state, rate, horizon, losses)
    return state
