r"""Without a search: forward passes whose learning rate nobody tuned, on five tasks.

Each part is one method of another configuration, in 16w8a: joint pairs on "digits" and
"mnist" (``quickstart.py``) and through the adapter on "solar" cells
(``joint_fine_tuning.py:adapter``), the exact head of one layer and joint pairs of three
on corrupted digits of severity 5 ("ood_1" and "ood_3", ``joint_ood.py``). It stands
there with the rates that its own configuration chooses from ("tuned"), and without a
search

- by Adam at ``fgrad.adapt``'s rate, 3e-3 ("default");
- by the optimizers of optax that find their rate themselves: "prodigy", "dadapt",
  "dog", "dowg", "mechanic".

Without a search all have the library's epsilon. The rates decay linearly in all.

    python -m experiments.main \
        --config=experiments/configs/untuned.py --workdir=workdir/untuned

needs ``pip install -e '.[solar,weights,corruptions]'``. One part:
``--config=experiments/configs/untuned.py:mnist``. Expect on mnist 94.5 ± 0.5 (tuned),
94.5 ± 0.3 (default) and 95.0 ± 0.2 (Prodigy); docs/results.md has all. A smoke run, on
digits, that shows no result: ``untuned.py:smoke``.

``untuned.py:epsilon_digits`` and ``:epsilon_mnist`` ask the same of epsilon where all
weights are perturbed, with a quarter of the quickstart's passes: one epsilon for all
leaves, of three, or one for each leaf as a share of its rms
(``fgrad.relative_epsilon``); in 16w8a, in 8w8a with updates that are rounded
("8w8a_rounded", since with grid steps there is no epsilon), and in 8w8a with grid steps
beside them. Learning rates are tuned for each.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import joint_fine_tuning, joint_ood, quickstart

ADAPT_RATE = 3e-3
# Optimizers that find their rate: theirs is a factor on it.
FREE = ("prodigy", "dadapt", "dog", "dowg", "mechanic")
# In units of all weights, and of each leaf's rms.
EPSILONS = {"weights": (0.01, 0.03, 0.1), "rms": (0.03, 0.1)}
ARITHMETICS = {"16w8a": (16, 8), "8w8a_rounded": (8, 8)}
PARTS = ("digits", "mnist", "solar", "ood_1", "ood_3")
# The method in 16w8a of each part's configuration.
METHODS = {"ood_1": "lp_1_exact_16w8a", "ood_3": "lp_3_pairs_16w8a"}


def get_config(variant: str = "full") -> ConfigDict:
    """The configuration.

    Args:
      variant: "full", one of `PARTS`, "smoke", "epsilon_digits" or "epsilon_mnist".
    """
    variants = ("full", *PARTS, "smoke", "epsilon_digits", "epsilon_mnist")
    if variant not in variants:
        raise ValueError(f"variant must be one of {list(variants)}, got {variant!r}.")
    if variant == "smoke":
        return _part("digits", smoke=True)
    if variant in PARTS:
        return _part(variant)
    if variant != "full":
        config = _of_epsilon()
        if variant == "epsilon_mnist":
            quickstart.to_mnist(config)
        return config
    config = ConfigDict({"parts": {}})
    for name in PARTS:
        config.parts[name] = _part(name)
    return config


def _part(name: str, smoke: bool = False) -> ConfigDict:
    if name == "solar":
        config = joint_fine_tuning.get_config("adapter")
    elif name.startswith("ood"):
        config = joint_ood.get_config("severity_5")
    else:
        variant = {"digits": "full", "mnist": "mnist"}[name]
        config = quickstart.get_config("smoke" if smoke else variant)
    tuned = config.methods[METHODS.get(name, "joint_16w8a")]
    untuned: dict[str, Any] = {"optimizer": "adam", "learning_rates": (ADAPT_RATE,)}
    if tuned.gradient == "joint":
        untuned["joint"] = {**tuned.joint, "epsilon": 0.1}
    default = quickstart.changed(tuned, untuned)
    methods = {"tuned": tuned, "default": default}
    for optimizer in FREE:
        changes = {"optimizer": optimizer, "learning_rates": (1.0,)}
        methods[optimizer] = quickstart.changed(default, changes)
    config.methods = ConfigDict(methods)
    config.run = tuple(methods)
    config.figure = "dots"
    return config


def _of_epsilon() -> ConfigDict:
    """All weights of digits perturbed, with every epsilon in both arithmetics."""
    config = quickstart.base()
    config.tuning_fraction, config.wider_tuning = 0.3, 2
    base = quickstart.changed(config.methods.forward_fp32, {"steps": 175})
    methods = {"8w8a": quickstart.changed(base, {"bits": (8, 8)})}
    for arithmetic, bits in ARITHMETICS.items():
        for unit, values in EPSILONS.items():
            for value in values:
                methods[f"{arithmetic}_{unit}_{value:.0e}"] = quickstart.changed(
                    base,
                    {
                        "bits": bits,
                        "low_bit": False,
                        "epsilon": value,
                        "epsilon_unit": unit,
                    },
                )
    config.methods = ConfigDict(methods)
    config.run = tuple(methods)
    config.figure = "dots"
    return config
