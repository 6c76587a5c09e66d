r"""Digits, as in the quickstart: perturbations of low rank against dense ones.

Sign-m-SPSA in float32 with the quickstart's budget and tuning; only z differs: normal,
Rademacher, and of rank 1, 2, 4 and 8.

Expected test accuracy, seeds 0 to 2, 22,400 forward passes each: normal 95.8 ± 0.3,
Rademacher 95.0 ± 0.0, rank 1 94.3 ± 0.6, rank 2 95.1 ± 1.0, rank 4 94.7 ± 0.4, rank 8
94.7 ± 0.8: low rank costs about a point against normal z.

    python -m experiments.main \
        --config=experiments/configs/low_rank.py --workdir=workdir/low_rank

A smoke run, mostly compilation: ``--config=experiments/configs/low_rank.py:smoke``.
"""

from ml_collections import ConfigDict

from experiments.configs import quickstart

RANKS = (1, 2, 4, 8)


def get_config(variant: str = "full") -> ConfigDict:
    """The configuration; ``variant`` as in the quickstart's."""
    config = quickstart.base(variant)
    forward = config.methods.forward_fp32
    forward.estimator = "sign_m_spsa"
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
