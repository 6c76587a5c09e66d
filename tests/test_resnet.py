import jax
import jax.numpy as jnp
import numpy as np
import pytest
import record_resnet as recorded
import recording
from test_checkpoints import whole, write_zip

from experiments.models import resnet


def load(weights):
    return resnet.from_state_dict(recorded.random_state_dict(weights))


@pytest.mark.parametrize("name", recorded.CASES)
def test_logits_are_those_of_torchvision(name):
    weights, count, size = recorded.CASES[name]
    params = load(weights)
    model = resnet.matching(params)
    assert model == resnet.ResNet(
        recorded.CLASSES, stage_sizes=recorded.STAGES[weights]
    )
    found = jax.jit(model.apply)({"params": params}, recording.images(count, size))
    expected = np.load(recorded.REFERENCES)[name]
    # float32 against float64; the largest difference seen is 3.4e-5 of logits up to
    # 44. An epsilon of 1e-6 is off by 1e-3.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("weights", recorded.STAGES)
def test_converted_parameters_are_those_of_the_model(weights):
    converted = load(weights)
    images = jnp.zeros((1, 32, 32, 3))
    init = resnet.matching(converted).init
    params = jax.eval_shape(init, jax.random.key(0), images)["params"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), converted) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )


def test_a_file_is_read(tmp_path):
    state = recorded.random_state_dict("uneven")
    tensors = {name: whole(name, array) for name, array in state.items()}
    counter = np.zeros((), np.int64)
    tensors["bn1.num_batches_tracked"] = whole("counter", counter)
    storages = [tensor.args[0] for tensor in tensors.values()]
    write_zip(tmp_path / "model.pth", tensors, storages)
    params = resnet.load(tmp_path / "model.pth")
    jax.tree.map(np.testing.assert_array_equal, params, load("uneven"))


def test_another_networks_weights_are_refused():
    state = recorded.random_state_dict("uneven")
    del state["layer2.0.downsample.1.bias"]
    state["layer2.0.conv3.weight"] = state["conv1.weight"]  # of a bottleneck
    match = r"lacks \['layer2.0.downsample.1.bias'\] and has \['layer2.0.conv3.weight"
    with pytest.raises(ValueError, match=match):
        resnet.from_state_dict(state)
