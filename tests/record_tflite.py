"""Records what LiteRT's reference kernels compute, for test_tflite.py.

pip install ai-edge-litert pymicro-wakeword
python tests/record_tflite.py
"""

import importlib.util
import pathlib

import numpy as np
import recording

REFERENCES = recording.REFERENCES / "tflite.npz"
NETWORKS = ("alexa", "okay_nabu")
STEPS = 12


def path(network):
    """A streaming keyword network of the package pymicro-wakeword; None without it."""
    # Not imported: it loads a library that the networks do not need.
    found = importlib.util.find_spec("pymicro_wakeword")
    if found is None:
        return None
    (folder,) = found.submodule_search_locations
    return pathlib.Path(folder) / "models" / f"{network}.tflite"


def inputs():
    """Features of any sound: int8 [steps, 1, 3 frames, 40 bins]."""
    shape = (STEPS, 1, 3, 40)
    return np.random.default_rng(0).integers(-128, 128, shape).astype(np.int8)


def interpreter(network):
    """An interpreter that keeps what every operation computes."""
    from ai_edge_litert import interpreter as litert

    made = litert.Interpreter(
        model_path=str(path(network)),
        experimental_op_resolver_type=litert.OpResolverType.BUILTIN_REF,
        experimental_preserve_all_tensors=True,
    )
    made.allocate_tensors()
    return made


def computed(network, numbers):
    """Tensors of some numbers after each step, one after the other."""
    made = interpreter(network)
    (given,) = made.get_input_details()
    steps = []
    for x in inputs():
        made.set_tensor(given["index"], x)
        made.invoke()
        steps.append(np.concatenate([made.get_tensor(n).ravel() for n in numbers]))
    return np.stack(steps)


def main():
    from experiments.models import int8_network

    recorded = {}
    for network in NETWORKS:
        numbers = int8_network.load(str(path(network))).numbers
        recorded[network] = computed(network, numbers[:-1])  # the last one is uint8
        print(f"{network}: {recorded[network].shape}")
    np.savez_compressed(REFERENCES, **recorded)


if __name__ == "__main__":
    main()
