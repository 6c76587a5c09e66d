import jax
import jax.numpy as jnp
import numpy as np
import pytest
import record_vit as recorded
import recording
from safetensors import numpy as safetensors_numpy
from test_checkpoints import whole, write_zip

from experiments.models import vit


def load(weights):
    heads = recorded.SIZES[weights][3]
    # Of a head of 64 features it is known.
    arguments = () if weights == "deit_tiny" else (heads,)
    return vit.from_state_dict(recorded.random_state_dict(weights), *arguments)


@pytest.mark.parametrize("name", recorded.CASES)
def test_logits_are_those_of_timm(name):
    weights, count, size = recorded.CASES[name]
    params = load(weights)
    model = vit.matching(params)
    patch, width, depth, heads, _ = recorded.SIZES[weights]
    assert model == vit.ViT(recorded.CLASSES, patch, width, depth, heads, 4 * width)
    found = jax.jit(model.apply)({"params": params}, recording.images(count, size))
    expected = np.load(recorded.REFERENCES)[name]
    # float32 against float64; the largest difference seen is 1.5e-6. The
    # tanh form of GELU is off by 4e-4, an epsilon of 1e-5 by 5e-3.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("weights", recorded.SIZES)
def test_converted_parameters_are_those_of_the_model(weights):
    converted = load(weights)
    pixels = recorded.SIZES[weights][-1]
    images = jnp.zeros((1, pixels, pixels, 3))
    init = vit.matching(converted).init
    params = jax.eval_shape(init, jax.random.key(0), images)["params"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), converted) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )


def test_files_are_read_as_timm_and_deit_publish_them(tmp_path):
    state = recorded.random_state_dict("narrow")
    safetensors_numpy.save_file(state, tmp_path / "model.safetensors")
    tensors = {name: whole(name, array) for name, array in state.items()}
    storages = [tensor.args[0] for tensor in tensors.values()]
    write_zip(tmp_path / "model.pth", {"model": tensors}, storages)
    for name in ("model.safetensors", "model.pth"):
        params = vit.load(tmp_path / name, num_heads=4)
        jax.tree.map(np.testing.assert_array_equal, params, load("narrow"))


def test_another_networks_weights_are_refused():
    state = recorded.random_state_dict("narrow")
    del state["blocks.1.norm2.bias"]
    state["dist_token"] = state["cls_token"]
    match = r"lacks \['blocks.1.norm2.bias'\] and has \['dist_token'\]"
    with pytest.raises(ValueError, match=match):
        vit.from_state_dict(state, num_heads=4)


@pytest.mark.parametrize("num_heads", [None, 5, 0])
def test_heads_must_divide_the_width(num_heads):
    state = recorded.random_state_dict("narrow")
    state = {name: array for name, array in state.items() if "blocks.1" not in name}
    if num_heads is None:  # less than one head of 64
        for name, shape in (("weight", (189, 63)), ("bias", (189,))):
            state[f"blocks.0.attn.qkv.{name}"] = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match=r"num_heads=\d does not divide the width"):
        vit.from_state_dict(state, num_heads)


@pytest.mark.parametrize(
    ("size", "match"),
    [
        (48, "48x48 pixels have 36 patches, and the positions are for 25: .* to 40x40"),
        (44, "44x44 pixels do not divide into patches of 8x8"),
    ],
)
def test_images_of_another_size_are_refused(size, match):
    params = load("narrow")
    with pytest.raises(ValueError, match=match):
        vit.matching(params).apply({"params": params}, recording.images(1, size))
