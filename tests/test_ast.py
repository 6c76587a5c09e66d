import jax
import numpy as np
import pytest
import record_ast as recorded

from experiments.models import ast


def load():
    return ast.from_state_dict(recorded.random_state_dict(), recorded.HEADS)


def test_logits_are_those_of_hugging_face():
    params = load()
    model = ast.matching(params, strides=recorded.STRIDES)
    assert model == ast.AST(
        recorded.CLASSES,
        recorded.PATCH,
        recorded.STRIDES,
        recorded.WIDTH,
        recorded.DEPTH,
        recorded.HEADS,
        3 * recorded.WIDTH,
    )
    x = recorded.spectrograms(2)[..., None]
    found = jax.jit(model.apply)({"params": params}, x)
    expected = np.load(recorded.REFERENCES)["narrow"]
    # float32 against float64, of logits up to 3. The tanh form of GELU is off by 1e-4.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_converted_parameters_are_those_of_the_model():
    converted = load()
    init = ast.matching(converted, strides=recorded.STRIDES).init
    x = recorded.spectrograms(1)[..., None]
    params = jax.eval_shape(init, jax.random.key(0), x)["params"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), converted) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )


def test_another_networks_weights_are_refused():
    state = recorded.random_state_dict()
    del state["classifier.layernorm.bias"]
    state["classifier.out.bias"] = state["classifier.dense.bias"]
    match = r"lacks \['classifier.layernorm.bias'\] and has \['classifier.out.bias'\]"
    with pytest.raises(ValueError, match=match):
        ast.from_state_dict(state)
    with pytest.raises(ValueError, match="num_heads=5 does not divide the width of 48"):
        ast.from_state_dict(recorded.random_state_dict(), 5)


@pytest.mark.parametrize(
    ("frames", "match"),
    [
        (42, "42 frames and 20 mel bins have 6x4 patches, and the positions .* for 20"),
        (7, "7 frames and 20 mel bins are smaller than a patch of 8x8"),
    ],
)
def test_spectrograms_of_another_size_are_refused(frames, match):
    params = load()
    model = ast.matching(params, strides=recorded.STRIDES)
    with pytest.raises(ValueError, match=match):
        model.apply({"params": params}, np.zeros((1, frames, recorded.MELS, 1)))
