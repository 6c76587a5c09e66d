r"""Few-shot learning of sounds: the paper's table 4, on recordings that Debian carries.

As ``fewshot_vision.py``, with 5-way 1-shot tasks: whose voice is it, of ten sets of
recordings in languages that were not seen before (`experiments.data.voices`, which says
what to put where). SimpleShot's nearest centroid with CL2N is the head, or ProtoNet's.

    python -m experiments.main \
        --config=experiments/configs/fewshot_audio.py --workdir=workdir/fewshot_audio

runs all cells and writes one table. One cell, with either head:

    --config=experiments/configs/fewshot_audio.py:voices,crnn_small,protonet
    --config=experiments/configs/fewshot_audio.py:esc50,ast,simpleshot

the latter from AudioSet's weights by ``--config.weights=model.safetensors``, the file
of Hugging Face's MIT/ast-finetuned-audioset-10-10-0.4593.

A smoke run: ``fewshot_audio.py:voices,crnn_small,simpleshot,smoke``. The paper tests on
10,000 tasks: ``--config.tasks=10000``.
"""

from typing import Any

from ml_collections import ConfigDict

from experiments.configs import fewshot_vision

# Name: (dataset, domain, what differs).
DATASETS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "voices": ("voices", "1s_32", {"tasks": 60}),  # 49 frames of 32 mel bins
    "esc50": ("esc50", "5s", {}),
    "fsdkaggle2018": ("fsdkaggle2018", "5s", {}),
}
NETWORKS = ("crnn_small", "ast_small")
HEADS = ("simpleshot", "protonet")


def get_config(cell: str = "") -> ConfigDict:
    """The configuration.

    Args:
      cell: "<dataset>,<network>", which a head and then "smoke" may follow; all cells
        of voices by default.
    """
    if cell:
        return _cell(*cell.split(","))
    config = ConfigDict({"driver": "few_shot", "parts": {}})
    for network in NETWORKS:
        for head in HEADS:
            config.parts[f"voices_{network}_{head}"] = _cell("voices", network, head)
    return config


def _cell(
    dataset: str, network: str, head: str = HEADS[0], variant: str = "full"
) -> ConfigDict:
    if dataset not in DATASETS:
        raise ValueError(
            f"dataset must be one of {', '.join(DATASETS)}, got {dataset!r}."
        )
    name, domain, changes = DATASETS[dataset]
    common = {"head": head, "k_shot": 1, "copies": 3, "input_shift": 2}
    return fewshot_vision.common(
        name, domain, network, variant, {**common, "input_noise": 0.2, **changes}
    )
