r"""Digits: a deep equilibrium network, adapted with and without a backward solve.

A network whose one layer is repeated up to its fixed point (9,000 weights) is trained
on upright digits and adapts to rotated ones: by backpropagation with the derivative of
the implicit function, which solves a second fixed point, by phantom gradients, which
unroll a few damped steps, and by forward gradients, which evaluate the solver and
nothing else. The cost is counted in evaluations of the layer for each example; a
derivative of it counts as two. Learning rates are tuned on the validation split.

Expected: see docs/equilibrium.md.

    python -m experiments.main \
        --config=experiments/configs/equilibrium.py --workdir=workdir/equilibrium

A smoke run, mostly compilation: ``--config=experiments/configs/equilibrium.py:smoke``.
"""

from ml_collections import ConfigDict, config_dict


def get_config(variant: str = "full") -> ConfigDict:
    """The configuration; ``variant`` as in the quickstart's."""
    if variant not in ("full", "smoke"):
        raise ValueError(f'variant must be "full" or "smoke", got {variant!r}.')
    smoke = variant == "smoke"
    config = ConfigDict()
    config.driver = "equilibrium"
    config.dataset = "digits"
    config.source, config.target = "upright", "rotated_30"
    config.data_dir = config_dict.placeholder(str)  # <workdir>/data by default
    config.backbone = ""
    config.seeds = (0,) if smoke else (0, 1, 2)
    config.tuning_seed = 100
    config.width = 16 if smoke else 64
    config.tolerance, config.max_steps = 1e-5, 150  # of the solver
    config.batch_size = 64
    config.pretrain_steps = 20 if smoke else 500  # of Adam, by the implicit derivative
    config.pretrain_rate = 3e-3
    config.estimates = 2 if smoke else 16  # of the gradient, for the cosine
    config.epsilon = 1e-2
    config.num_perturbations = 2 if smoke else 16  # m

    # name: the steps that are unrolled (0: the implicit derivative), or "forward"; the
    # length of a run; rates of momentum SGD, or of SGD for forward gradients.
    config.methods = ConfigDict()
    for name, kind, steps, rates in (
        ("implicit", 0, 300, (0.1, 0.3, 1.0)),
        ("phantom_1", 1, 300, (0.1, 0.3, 1.0)),
        ("phantom_5", 5, 300, (0.1, 0.3, 1.0)),
        ("forward", "forward", 700, (0.04, 0.08, 0.16)),
    ):
        config.methods[name] = ConfigDict(
            {
                "kind": kind,
                "steps": 10 if smoke else steps,
                "learning_rates": rates[1:2] if smoke else rates,
            }
        )
    config.run = tuple(config.methods)
    return config
