"""Launches an experiment.

python -m experiments.main --config=experiments/configs/quickstart.py \
        --workdir=workdir/quickstart --config.seeds=0,1,2,3,4

The same command goes on with an experiment that was killed or interrupted. What was
compiled for it is kept in the user's cache folder; --nocompilation_cache keeps nothing.
``--list`` prints the names of configurations, networks, datasets and the like.
"""

import signal
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from experiments import compiled_programs, listing
from experiments.drivers import (
    equilibrium_table,
    few_shot,
    influence_table,
    keyword_table,
    landscape_figures,
    memory_table,
    private_table,
    replay,
    sampled_table,
    test_time_table,
    text_table,
    training,
    training_time,
)
from experiments.drivers.progress import INTERRUPTED, StoppedError
from experiments.usage import UsageError, check_names
from experiments.workdir.runs import InUseError

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Configuration file; values are overridden by --config.name=value."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for data and results.")
_MESH = flags.DEFINE_string(
    "mesh",
    None,
    "Devices that share the runs of a method, and of a step the pairs and the batch: "
    "seeds=4,data=2. On a CPU XLA_FLAGS=--xla_force_host_platform_device_count=8 makes "
    "as many.",
)
_REPLAY = flags.DEFINE_string(
    "replay",
    None,
    "A run to make again from its losses, such as forward_16w8a/seed_0; it has to end "
    "in the same bits.",
)
_RESUME = flags.DEFINE_bool(
    "resume", True, "Go on with what the workdir holds; --noresume begins anew."
)
flags.DEFINE_bool("list", False, "Print the names that there are, and do nothing else.")
_CACHE = flags.DEFINE_bool(
    "compilation_cache",
    True,
    "Keep compiled programs in the user's cache folder for the next start.",
)
_DRIVERS = {
    "equilibrium": equilibrium_table.run,
    "few_shot": few_shot.run,
    "influence": influence_table.run,
    "keywords": keyword_table.run,
    "landscape": landscape_figures.run,
    "memory": memory_table.run,
    "private": private_table.run,
    "sampled": sampled_table.run,
    "test_time": test_time_table.run,
    "text": text_table.run,
    "train": training.run,
    "training_time": training_time.run,
}
_INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: Sequence[str]) -> None:
    """Runs the experiment that the flags name."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)  # orbax tells much of every snapshot
    config = _CONFIG.value
    driver = config.get("driver", "train")
    signal.signal(signal.SIGINT, _interrupt)
    sys.unraisablehook = _unraisable
    try:
        check_names("driver", [driver], _DRIVERS)
        if _MESH.value is not None:
            _set_mesh(config, driver, _MESH.value)
        if _CACHE.value:
            compiled_programs.keep()
        if _REPLAY.value is not None:
            replay.run(config, _WORKDIR.value, _REPLAY.value)
        else:
            _DRIVERS[driver](config, _WORKDIR.value, _RESUME.value)
    except (UsageError, InUseError) as error:
        sys.exit(f"error: {error}")
    except (KeyboardInterrupt, StoppedError):
        print(
            f"\nInterrupted. The same command goes on from what {_WORKDIR.value} holds;"
            " with --noresume it begins anew.",
            file=sys.stderr,
        )
        sys.exit(_INTERRUPTED)


def _set_mesh(config: Any, driver: str, mesh: str) -> None:
    """Puts the mesh into a configuration, or into all of its parts."""
    if driver != "train":
        raise UsageError(
            f"the runs of this configuration, of the driver {driver!r}, are not shared "
            "by devices; leave out --mesh."
        )
    for part in config.parts.values() if "parts" in config else [config]:
        part.mesh = mesh


def _interrupt(*_: Any) -> None:
    """What Ctrl-C does: it lets threads end as well."""
    INTERRUPTED.set()
    raise KeyboardInterrupt


def _unraisable(lost: Any) -> None:
    """Tells of an exception in a finalizer, unless it is that of Ctrl-C."""
    if not issubclass(lost.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(lost)


def parse(argv: Sequence[str]) -> list[str]:
    """Parses the command line; ends the program with a message if that fails."""
    if "--list" in argv:  # which needs no configuration
        print(listing.text())
        sys.exit(0)
    try:
        rest = flags.FLAGS(list(argv))
        _CONFIG.value.keys()  # a file that cannot be read is told at the first access
        return rest
    except flags.Error as error:
        # What a configuration file raised stands at the end of a traceback.
        first, *others = str(error).strip().splitlines()
        what = f"{first} {others[-1].strip()}" if others else first
        sys.exit(f"error: {what}")
    except OSError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        sys.exit(f"error: the configuration file cannot be read: {reason}")
    except (AttributeError, KeyError) as error:  # the text is quoted twice
        reason = str(error.args[0]).replace("\\n", " ").replace("\\'", "'").strip("'\"")
        sys.exit(f"error: the configuration has no such field: {reason}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
