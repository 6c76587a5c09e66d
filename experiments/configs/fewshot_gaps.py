r"""Few-shot learning of sounds, where full fine-tuning by forward passes lost the most.

The cells of ``fewshot_audio.py`` whose gap to backpropagation was above a point, with
rates chosen on 40 tasks of the validation split in the place of ten, for all methods.
Beside four pairs in a step ("ft_16w8a") stand, with as many forward passes, one pair in
each of four times the steps ("ft_one_pair_16w8a"), and momentum with it
("ft_momentum_16w8a").

    python -m experiments.main \
        --config=experiments/configs/fewshot_gaps.py --workdir=workdir/fewshot_gaps

One cell: ``fewshot_gaps.py:voices,ast_small,simpleshot``. Expect a gap of 1.7 ± 0.9
points in it by four pairs, and of 1.7 ± 1.0 by one; the other cells were not run.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import fewshot_audio, fewshot_vision, quickstart

CELLS = (
    "voices,ast_small,simpleshot",
    "voices,ast_small,protonet",
    "voices,crnn_small,simpleshot",
)
TUNING_TASKS = 40


def get_config(cell: str = "") -> ConfigDict:
    """The configuration.

    Args:
      cell: as ``fewshot_audio.py``; those of `CELLS` by default.
    """
    if cell:
        return _cell(cell)
    config = ConfigDict({"driver": "few_shot", "parts": {}})
    for name in CELLS:
        config.parts[name.replace(",", "_")] = _cell(name)
    return config


def _cell(cell: str) -> ConfigDict:
    config = fewshot_audio.get_config(cell)
    smoke = cell.endswith("smoke")
    pairs, steps = (1, 2) if smoke else fewshot_vision.BUDGET["ft"]
    fine = config.methods.ft_16w8a
    one_pair: dict[str, Any] = {"num_perturbations": 1, "steps": pairs * steps}
    # The mean of four directions is half as long as one, and there are four times as
    # many steps: a quarter of the rate goes as far.
    one_pair["learning_rates"] = tuple(x / 4 for x in fine.learning_rates)
    config.methods.ft_one_pair_16w8a = quickstart.changed(fine, one_pair)
    slower = tuple(x / 10 for x in one_pair["learning_rates"])
    config.methods.ft_momentum_16w8a = quickstart.changed(
        fine, {**one_pair, "optimizer": "momentum", "learning_rates": slower}
    )
    config.run = ("ft_backprop", "ft_16w8a", "ft_one_pair_16w8a", "ft_momentum_16w8a")
    if not smoke:
        config.tuning_tasks = TUNING_TASKS
    return config
