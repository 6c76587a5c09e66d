r"""Is there a person in the picture? A published ViT-tiny moves to Visual Wake Words.

The paper's cross-domain task: DeiT-tiny, pre-trained on ImageNet by its authors, adapts
to photographs of COCO by a linear probe or by deep visual prompts and the head, by
backpropagation and by forward gradients in float32, 16w8a and 8w8a. Nothing is
pre-trained here, so that the head begins at random and "zero_shot" is chance.

Neither weights nor data are in packages: TFDS prepares COCO 2014 (38 GB, see
`experiments.data.wake_words`), and the weights are a file of timm's
deit_tiny_patch16_224, under Apache-2.0. This has run on data and weights of the tests
only; the paper reports errors of 12.1 (backpropagation), 12.5 (float) and 12.7 (16w8a)
for the probe, and of 7.0, 11.1 and 11.4 for the prompts.

    python -m experiments.main --config=experiments/configs/wake_words.py \
        --config.weights=deit_tiny_patch16_224.safetensors --config.data_dir=data \
        --workdir=workdir/wake_words
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import ood, quickstart

WAYS = {
    "lp": ood.WAYS["lp_1"],
    "d_vpt": ({"deep_prompts": {"num_prompts": 10}}, *ood.WAYS["d_vpt"][1:]),
}
METHODS: dict[str, dict[str, Any]] = {
    **{name: ood.METHODS[name] for name in ("fp32", "16w8a")},
    "8w8a": {"bits": (8, 8)},
}


def get_config(variant: str = "full") -> ConfigDict:
    """The configuration; ``variant`` as in the quickstart's."""
    config = quickstart.base(variant)
    smoke = variant == "smoke"
    config.network = "vit_tiny"
    config.weights = ood.WEIGHTS
    config.dataset = "visual_wake_words"
    # Pixels of a side, and pictures of a split; positions are interpolated.
    config.source = config.target = "32" if smoke else "96_20000"
    config.figure = "dots"
    config.parallel_runs = 1
    config.pretrain.steps = 0
    if not smoke:
        config.seeds = (0, 1, 2, 3, 4)
        config.tuning_fraction, config.wider_tuning = 0.25, 1
    ood.adapted(config, WAYS, METHODS, smoke=smoke)
    return config
