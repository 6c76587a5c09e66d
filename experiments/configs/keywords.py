r"""New words and new voices for a published keyword network of int8, from few examples.

A streaming network of 55 KB that hears "Alexa" (pymicro-wakeword, Apache-2.0) stays in
the integers of its TFLite file up to a block; the blocks that follow, whose kernels
begin as the file's int8, and a new head learn ten things that it never heard of:

- words: ten words of eSpeak NG, by as many takes of each as ``shots`` says, in noise.
  All voices of the test split are others than those of the examples. The speech is
  synthetic (`experiments.data.words`).
- voices: whose recording is it, of ten sets of recorded speech in ten languages
  (`experiments.data.voices`, which says what to put where).

By backpropagation in float32 and by `fgrad.adapt`, of the head alone (whose gradient is
exact) and with the blocks, at equal evaluations. Learning rates are chosen for each
method and task by other words in the voices of the validation split, and by its sets.

    python -m experiments.main \
        --config=experiments/configs/keywords.py --workdir=workdir/keywords

``keywords.py:words`` needs no downloads; ``keywords.py:smoke`` shows no result. It
needs ``pip install -e '.[keywords]'``.

Expected test accuracy on words and voices, seeds 0 to 4: 73.5 ± 1.2 and 51.9 ± 3.6
(backpropagation of the head), 79.2 ± 1.0 and 58.2 ± 1.4 (with block 2); 74.8 ± 1.5 and
52.0 ± 3.7, 72.9 ± 1.3 and 52.1 ± 3.2, 72.5 ± 1.3 and 51.7 ± 3.6 (exact head in float32,
16w8a and 8w8a); 77.3 ± 2.3 and 55.4 ± 2.5, 79.8 ± 1.4 and 57.0 ± 3.1, 78.6 ± 1.3 and
57.6 ± 0.6 (block 2 and head by forward passes).
"""

from ml_collections import ConfigDict, config_dict

EVALUATIONS = 900
EVERY = 8
BITS = {"fp32": None, "16w8a": (16, 8), "8w8a": (8, 8)}


def get_config(variant: str = "full") -> ConfigDict:
    """The configuration.

    Args:
      variant: "full", "words", "voices", or "smoke" for some steps on words.
    """
    tasks = {
        "full": ("words", "voices"),
        "words": ("words",),
        "voices": ("voices",),
        "smoke": ("words",),
    }
    if variant not in tasks:
        raise ValueError(f"variant must be one of {list(tasks)}, got {variant!r}.")
    smoke = variant == "smoke"
    config = ConfigDict({"driver": "keywords", "tasks": tasks[variant]})
    config.data_dir = config_dict.placeholder(str)  # <workdir>/data by default
    config.network = "alexa"  # of pymicro-wakeword
    # The first and the last block that train, of four; what comes behind is left out.
    config.first, config.last = 2, 2
    config.num_classes = 10
    config.shots = 10  # examples of each class
    config.seeds = (0,) if smoke else (0, 1, 2, 3, 4)  # examples, batches, directions
    config.tuning_seeds = (100,) if smoke else (100, 101)
    # How many further rates may be tried while the best is the smallest or largest.
    config.wider_tuning = 0 if smoke else 3
    config.batch_size = 32
    config.every = EVERY  # a joint pair in every so many steps
    config.headroom = 1.5  # weights may grow to this multiple of max|w|
    config.zero_bound = 1.0  # taken for max|w| where all weights are zero: the head
    config.activation_headroom = 1.5  # the same for activations
    config.methods = ConfigDict()
    for name, cost, alone in (("backprop", 3, False), ("backprop_head", 3, True)):
        config.methods[name] = _method("backward", cost, alone, None, smoke)
    for arithmetic, bits in BITS.items():
        head = _method("adapt", 1, True, bits, smoke)
        joint = _method("adapt", 1 + 2 / EVERY, False, bits, smoke)
        config.methods[f"exact_head_{arithmetic}"] = head
        config.methods[f"adapt_{arithmetic}"] = joint
    order = [f"{kind}_{a}" for kind in ("exact_head", "adapt") for a in BITS]
    config.run = ("backprop_head", "backprop", *order)
    return config


def _method(
    gradient: str,
    cost: float,
    head_alone: bool,
    bits: tuple[int, int] | None,
    smoke: bool,
) -> ConfigDict:
    """A way to adapt at the common number of evaluations."""
    method = ConfigDict(type_safe=False)
    method.gradient = gradient  # "backward", or "adapt" for `fgrad.adapt`
    method.head_alone = head_alone
    method.bits = bits  # of weights and activations; float32 without
    method.steps = 8 if smoke else int(EVALUATIONS / cost)
    method.passes = int(method.steps * cost)
    middle = 3e-2 if head_alone else 1e-2  # of the learning rates, which are Adam's
    rates = (middle,) if smoke else (middle / 3, middle, 3 * middle)
    method.learning_rates = tuple(float(f"{rate:.2g}") for rate in rates)
    return method
