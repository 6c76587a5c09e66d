"""On the way, joint pairs take the memory of inference, as the compiler plans it."""

import functools

import pytest

# The data of the experiments, which their networks know.
pytest.importorskip("tensorflow_datasets")

from experiments.benchmarks import joint_memory, measure, programs, subjects
from experiments.models import cnn, efficientnet, vit

NETWORKS = {
    "cnn": subjects.Subject(
        functools.partial(cnn.CNN, features=(16,) * 4, strides=(1,) * 4), (16, 16, 1)
    ),
    "vit": subjects.Subject(
        functools.partial(
            vit.ViT, patch=4, width=32, depth=2, num_heads=2, mlp_width=128
        ),
        (16, 16, 1),
    ),
    "efficientnet": subjects.Subject(efficientnet.EfficientNetLite0, (32, 32, 3)),
}


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize(
    ("name", "arithmetic"),
    [
        ("cnn", "float32"),
        ("cnn", "16w8a"),
        ("vit", "float32"),
        ("vit", "16w8a"),
        ("efficientnet", "float32"),
    ],
)
def test_on_the_way_the_memory_is_near_that_of_inference(name, arithmetic, monkeypatch):
    # The first two stages of blocks; those of the network are narrower and alike.
    monkeypatch.setattr(efficientnet, "_STAGES", efficientnet._STAGES[:2])
    problem = subjects.problem(NETWORKS[name], 64, arithmetic, of_examples=True)
    memory = measure.plan(
        {
            "inference": programs.inference(problem),
            "step": joint_memory.gradient(problem, on_the_way=True),
        }
    )
    assert memory["step"].temporaries <= 1.3 * memory["inference"].temporaries
    evaluations, _ = joint_memory.passes(problem)
    assert evaluations <= 4


@pytest.mark.slow
@pytest.mark.optimized
def test_what_is_kept_otherwise():
    """All activations, which are many times as much."""
    problem = subjects.problem(NETWORKS["cnn"], 64, "float32", of_examples=True)
    memory = measure.plan(
        {
            "inference": programs.inference(problem),
            "step": joint_memory.gradient(problem, on_the_way=False),
        }
    )
    assert memory["step"].temporaries > 3 * memory["inference"].temporaries
