"""The networks of the experiments, small: audited, close to float, the same in C."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import some

# The data of the experiments, which their networks know.
pytest.importorskip("tensorflow_datasets")

from experiments.benchmarks import emulation
from experiments.models import cnn, crnn, efficientnet, lstm, mlp, resnet12, vit
from fgrad.integer import audit, convert, train_step
from tests.integer.conftest import steps_in_c


class EfficientNetHead(efficientnet.EfficientNetLite0):
    """What follows the blocks: the last convolution, pooling, standardization, head."""

    def __call__(self, x):
        return super().__call__(x, start=-2)


NETWORKS = {
    "mlp": (mlp.MLP(3, width=8, depth=2), (6,)),
    "cnn": (cnn.CNN(3, features=(4, 6, 8)), (8, 8, 1)),
    "efficientnet_head": (EfficientNetHead(3, standardized=True), (1, 1, 320)),
    "resnet12": (resnet12.ResNet12(3, widths=(4, 6)), (8, 8, 3)),
    "vit": (
        vit.ViT(3, patch=4, width=8, depth=1, num_heads=2, mlp_width=16),
        (8, 8, 3),
    ),
    "lstm": (lstm.LSTM(3, features=6), (5, 4)),
    "crnn": (crnn.CRNN(3, width=4, depth=2, pool=(2, 2)), (12, 8, 1)),
    "crnn_lstm": (crnn.CRNN(3, width=4, depth=1, pool=(2, 2), cell="lstm"), (8, 4, 1)),
}


@pytest.mark.parametrize("name", some(NETWORKS, ["mlp"]))
def test_a_step_has_no_float_and_the_bits_of_jax_in_c(name, tmp_path):
    network, shape = NETWORKS[name]
    inputs = jax.random.normal(jax.random.key(0), (16, *shape))
    params = jax.jit(network.init)(jax.random.key(1), inputs)["params"]

    def logits(params, inputs):
        return network.apply({"params": params}, inputs)

    program = convert(logits, params, inputs)
    encoded = program.encode(inputs)
    exact = np.asarray(jax.jit(logits)(params, inputs))
    found = jax.jit(program.decode)(program.params, encoded)
    error = np.asarray(found) - exact
    assert np.std(error) < 0.06 * np.std(exact)

    init, step = train_step(
        program,
        jax.random.key(2),
        learning_rate=0.05,
        epsilon=0.02,
        num_perturbations=1,
    )
    weights, state = init()
    batch = encoded[:2], jnp.array([0, 2])
    types = audit.check(step, weights, state, batch)
    assert types <= {"i1", "i8", "i16", "i32", "ui32"}
    if not emulation.has_host_compiler():
        pytest.skip("needs a C compiler (gcc or cc)")
    steps_in_c(step, [(np.asarray(batch[0]), np.array([0, 2], np.int32))], tmp_path)
