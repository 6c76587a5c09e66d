"""Digits, as in the quickstart: perturbations of low rank against dense ones.

Sign-m-SPSA in float32 with the quickstart's budget and tuning; only z differs: normal,
Rademacher, and of rank 1, 2, 4 and 8.

    python -m experiments.main \
        --config=experiments/configs/low_rank.py --workdir=workdir/low_rank

A smoke run of some seconds: ``--config=experiments/configs/low_rank.py:smoke``.
"""

from ml_collections import ConfigDict

from experiments.configs import quickstart

RANKS = (1, 2, 4, 8)


def get_config(variant: str = "full") -> ConfigDict:
    """The configuration; ``variant`` as in the quickstart's."""
    config = quickstart.get_config(variant)
    forward = config.methods.forward_fp32
    config.methods = ConfigDict()
    config.methods.normal = forward
    config.methods.rademacher = forward.copy_and_resolve_references()
    config.methods.rademacher.perturbation = "rademacher"
    for rank in RANKS:
        method = forward.copy_and_resolve_references()
        method.perturbation, method.rank = "low_rank", rank
        config.methods[f"rank_{rank}"] = method
    config.run = tuple(config.methods)
    return config
