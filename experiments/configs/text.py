r"""Text: a decoder of bytes moves to another domain, and learns a task of words.

A decoder of 73,536 parameters, pre-trained on the reference of a programming language
(`experiments.data.texts`: texts that packages carry), is adapted in two ways.

* ``language``: to the source of Python's modules. Tells nats per byte of the test
  split; the perplexity per byte is e to that power.
* ``kinds``: a line of text, followed by a word for what it is: prose, Python, C or
  JavaScript. The loss is that of the word's bytes, as in MeZO; tells accuracy as well.

Methods: LoRA (`fgrad.lora`) and all weights; backpropagation, and forward passes with
ten times the steps, in float32, 16w8a and 8w8a. Learning rates are chosen on the
validation split by shorter runs. Sequences have the lengths that they have, and are
padded to one of two: so a step is compiled twice.

    python -m experiments.main \
        --config=experiments/configs/text.py --workdir=workdir/text

Expected, nats per byte of the test split after 60 steps by backpropagation, 3 seeds:
2.244 ± 0.001 (LoRA) and 2.112 ± 0.010 (all weights), 2.352 before; forward LoRA after
600 steps 2.288 ± 0.009 (float32), 2.309 ± 0.004 (16w8a) and 2.317 ± 0.005 (8w8a). The
rest was not run (docs/results.md).

A smoke run: ``--config=experiments/configs/text.py:smoke``.
"""

from typing import Any

from ml_collections import ConfigDict, config_dict

from experiments.configs import quickstart


def get_config(variant: str = "full") -> ConfigDict:
    """The configuration; ``variant`` as in the quickstart's."""
    base = quickstart.base(variant)
    smoke = variant == "smoke"
    config = ConfigDict()
    config.driver = "text"
    config.network = "decoder"
    config.dataset = "texts"
    config.source, config.target = "prose", "python"
    config.weights = config.backbone = ""
    config.data_dir = config_dict.placeholder(str)
    config.buckets = (64, 96)  # lengths that sequences are padded to, in bytes
    config.words = ConfigDict(  # for the kinds of lines
        {"prose": "text", "python": "python", "c": "c", "javascript": "script"}
    )
    # Of each kind; and the shortest and longest line, in bytes.
    config.lines = ConfigDict({"train": 300, "validation": 50, "test": 120})
    config.line_lengths = (20, 80)
    config.test_pieces = 20 if smoke else 400  # at most, of the language
    config.seeds = (0,) if smoke else (0, 1, 2)
    config.tuning_seeds = (100,)
    config.tuning_fraction = 0.3
    config.wider_tuning = 0 if smoke else 1
    config.tasks = ("language", "kinds")
    config.lora = ConfigDict({"rank": 2, "where": "query|value"})

    config.pretrain = _pretrain(smoke)
    rows = _rows(base, smoke)
    config.methods = ConfigDict(
        {
            name: quickstart.changed(method, changes)
            for name, (method, changes) in rows.items()
        }
    )
    config.run = tuple(rows)
    return config


def _pretrain(smoke: bool) -> ConfigDict:
    """The training of the network from which all runs start."""
    pretrain = ConfigDict()
    pretrain.committed = True  # see `experiments.starts`
    pretrain.gradient = "backward"
    pretrain.optimizer = "adam"
    pretrain.learning_rate = 3e-3
    pretrain.steps = 3 if smoke else 1500
    pretrain.batch_size = 4 if smoke else 16
    pretrain.seed = 0
    return pretrain


def _rows(
    base: ConfigDict, smoke: bool
) -> dict[str, tuple[ConfigDict, dict[str, Any]]]:
    """By name of a method, what it begins from and what differs."""
    steps = 3 if smoke else 60
    backward = {
        "optimizer": "adam",
        "batch_size": 8,
        "steps": steps,
        "learning_rates": (3e-3,) if smoke else (1e-2, 3e-2, 1e-1),
    }
    forward = {
        **backward,
        "steps": 2 if smoke else 10 * steps,
        "epsilon": 1e-2,
        "num_perturbations": 2 if smoke else 8,  # 16 passes a step
        "estimator": "spsa",
        "learning_rates": (3e-3,) if smoke else (4e-3, 7e-3, 1.2e-2),
        "calibration_images": 64,  # pieces
    }
    full, forward_full = ({**one, "trains": "full"} for one in (backward, forward))
    if not smoke:
        full["learning_rates"] = (3e-3, 1e-2, 3e-2)
        forward_full["learning_rates"] = (1e-4, 3e-4, 1e-3)
    backprop, perturbed = base.methods.backprop, base.methods.forward_fp32
    return {
        "lora_backprop": (backprop, {**backward, "trains": "lora"}),
        "full_backprop": (backprop, full),
        "full_checkpoints": (backprop, {**full, "checkpoint": True}),
        **{
            f"lora_{name}": (perturbed, {**forward, "bits": bits, "trains": "lora"})
            for name, bits in quickstart.BITS.items()
        },
        "full_fp32": (perturbed, forward_full),
    }
