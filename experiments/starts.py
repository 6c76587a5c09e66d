r"""Pre-trained networks that are part of the repository, so that runs begin alike.

Pre-training in float32 ends elsewhere on another processor: instructions that add up in
another order round otherwise, and hundreds of steps make much of it. A configuration
whose pre-training was run before, here, begins from its end. What it was pre-trained
by lies beside it, and a configuration that differs from that pre-trains anew.

    python -m experiments.starts \
        --config=experiments/configs/quickstart.py --workdir=workdir/start

writes the start of a configuration again.
"""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

import fgrad
from experiments.usage import UsageError

FOLDER = pathlib.Path(__file__).parent / "models" / "starts"

# What decides where pre-training ends, beside the settings in `pretrain`.
_FIELDS = ("network", "weights", "backbone", "dataset", "source")


def settings(config: ConfigDict) -> dict[str, Any]:
    """What a configuration pre-trains by, as JSON has it.

    Args:
      config: see ``configs/quickstart.py``.
    """
    found = {name: config.get(name) for name in _FIELDS}
    found["pretrain"] = {
        name: value
        for name, value in config.pretrain.to_dict().items()
        if name != "committed"
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def committed(config: ConfigDict) -> Any:
    """The float parameters where a configuration begins, or None to pre-train.

    Args:
      config: see ``configs/quickstart.py``.
    """
    if not config.pretrain.get("committed", False):
        return None
    wanted = settings(config)
    for path in sorted(FOLDER.glob("*.json")):
        if json.loads(path.read_text()) == wanted:
            return fgrad.load(path.with_suffix(".safetensors"))
    return None


def write(config: ConfigDict, params: Any, folder: pathlib.Path = FOLDER) -> None:
    """Keeps the end of a pre-training as the start of its configuration.

    Args:
      config: see ``configs/quickstart.py``.
      params: the float parameters.
      folder: where to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{config.network}_{config.dataset}_{config.source}"
    fgrad.save(folder / f"{name}.safetensors", params)
    text = json.dumps(settings(config), indent=2, sort_keys=True)
    (folder / f"{name}.json").write_text(f"{text}\n")


def main(argv: Sequence[str]) -> None:
    """Pre-trains by a configuration and writes the start."""
    del argv
    logging.set_verbosity(logging.WARNING)  # orbax tells much of every snapshot
    config = flags.FLAGS.config
    config.pretrain.committed = False
    try:
        params = _pretrained(config, pathlib.Path(flags.FLAGS.workdir))
    except UsageError as error:
        sys.exit(f"error: {error}")
    write(config, params)


def _pretrained(config: ConfigDict, workdir: pathlib.Path) -> Any:
    # The drivers begin from a start, so that they cannot be imported by this module.
    from experiments.drivers import progress, text_table, training

    with progress.show_progress() as told:
        told.expect(config.pretrain.steps)
        if config.get("driver") == "text":
            return text_table.pretrained(config, told.advance)
        return training.prepare(config, workdir, told).start


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Configuration file.")
    flags.DEFINE_string("workdir", None, "Directory for data and the run.")
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
