"""Launches an experiment.

python -m experiments.main --config=experiments/configs/quickstart.py \
        --workdir=workdir/quickstart --config.seeds=0,1,2,3,4

The same command goes on with an experiment that was killed.
"""

from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from experiments import fewshot_train, landscape, memory, train

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file; values are overridden by --config.name=value."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for data and results.")
_RESUME = flags.DEFINE_bool(
    "resume", True, "Go on with what the workdir holds; --noresume begins anew."
)
_DRIVERS = {
    "few_shot": fewshot_train.run,
    "landscape": landscape.run,
    "memory": memory.run,
    "train": train.run,
}
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: Sequence[str]) -> None:
    """Runs the experiment that the flags name."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)  # orbax tells much of every snapshot
    driver = _CONFIG.value.get("driver", "train")
    _DRIVERS[driver](_CONFIG.value, _WORKDIR.value, _RESUME.value)


if __name__ == "__main__":
    app.run(main)
