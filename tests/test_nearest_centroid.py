import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.learners import episodes, nearest_centroid

# Classes of unequal sizes under numbers with gaps, in no order.
SIZES = {11: 9, 2: 7, 40: 12, 5: 8}
LABELS = np.random.default_rng(0).permutation(
    np.repeat(list(SIZES), list(SIZES.values()))
)


def features(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def many(sample, seed=0, tasks=200):
    return jax.jit(jax.vmap(sample))(jax.random.split(jax.random.key(seed), tasks))


def test_tasks_are_of_distinct_classes_and_examples():
    sample = episodes.sampler(LABELS, n_way=3, k_shot=2, num_queries=5)
    tasks = many(sample)
    assert tasks.support.shape == (200, 3, 2)
    assert tasks.query.shape == (200, 3, 5)
    for classes, support, query in zip(*map(np.asarray, tasks), strict=True):
        assert len(set(classes)) == 3
        drawn = np.concatenate([support, query], axis=1)
        assert len(set(drawn.ravel())) == drawn.size
        np.testing.assert_array_equal(LABELS[drawn], np.tile(classes[:, None], 7))


def test_classes_and_examples_are_drawn_evenly():
    sample = episodes.sampler(LABELS, n_way=2, k_shot=1, num_queries=2)
    tasks = many(sample, tasks=6000)
    per_class = [int(np.sum(tasks.classes == label)) for label in SIZES]
    # 6000 tasks of 2 of 4 classes: 3000 each, with a deviation of 39.
    np.testing.assert_allclose(per_class, 3000, atol=5 * 39)
    for label, size in SIZES.items():
        (members,) = np.nonzero(label == LABELS)
        for part, share in ((tasks.support, 1), (tasks.query, 2)):
            counts = np.bincount(np.ravel(part), minlength=len(LABELS))[members]
            expected = 3000 * share / size
            np.testing.assert_allclose(counts, expected, atol=5 * expected**0.5)


def test_a_key_gives_one_task():
    sample = episodes.sampler(LABELS, n_way=3, k_shot=2, num_queries=5)
    key = jax.random.key(3)
    task = sample(key)
    again = episodes.sampler(jnp.asarray(LABELS), n_way=3, k_shot=2, num_queries=5)(key)
    others = many(sample, seed=3, tasks=20)
    batched = many(sample, seed=3, tasks=20)
    single = sample(jax.random.split(key, 20)[7])
    jax.tree.map(np.testing.assert_array_equal, task, again)
    jax.tree.map(np.testing.assert_array_equal, others, batched)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[7], y), others, single)
    assert len({np.asarray(x).tobytes() for x in others.support}) > 15


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"n_way": 5}, "4 classes, fewer than n_way=5"),
        ({"k_shot": 4, "num_queries": 4}, r"class 2 has 7 examples, fewer .* = 4 \+ 4"),
        ({"n_way": 0}, "n_way must be at least 1, got 0"),
        ({"k_shot": 0}, "k_shot must be at least 1, got 0"),
        ({"num_queries": -1}, "num_queries must be at least 1, got -1"),
    ],
)
def test_impossible_tasks_are_refused(settings, match):
    settings = {"n_way": 2, "k_shot": 1, "num_queries": 1, **settings}
    with pytest.raises(ValueError, match=match):
        episodes.sampler(LABELS, **settings)
    # One fewer is possible.
    episodes.sampler(LABELS, n_way=4, k_shot=3, num_queries=4)


def test_shared_classes_are_found():
    parts = {"train": np.array([1, 1, 2]), "validation": np.array([3])}
    episodes.check_disjoint({**parts, "test": np.array([4, 5])})
    with pytest.raises(ValueError, match=r"train and test share the classes \[2\]"):
        episodes.check_disjoint({**parts, "test": np.array([4, 2])})


def numpy_logits(support, query):
    """One distance at a time, in float64."""
    support, query = support.astype(np.float64), query.astype(np.float64)
    found = np.zeros((*query.shape[:2], len(support)))
    for place in np.ndindex(found.shape):
        way, index, other = place
        centroid = sum(support[other]) / support.shape[1]
        found[place] = -(np.linalg.norm(query[way, index] - centroid) ** 2)
    return found


def test_protonet_is_numpys():
    support, query = features(0, 4, 3, 6), features(1, 4, 5, 6)
    expected = numpy_logits(support, query)
    logits = nearest_centroid.protonet_logits(jnp.asarray(support), jnp.asarray(query))
    np.testing.assert_allclose(logits, expected, rtol=1e-5)
    shares = np.exp(expected) / np.exp(expected).sum(-1, keepdims=True)
    own = [-np.log(shares[n, q, n]) for n, q in np.ndindex(4, 5)]
    loss = nearest_centroid.protonet_loss(jnp.asarray(support), jnp.asarray(query))
    np.testing.assert_allclose(loss, np.mean(own), rtol=1e-5)
    hits = [expected[n, q].argmax() == n for n, q in np.ndindex(4, 5)]
    assert 0 < np.mean(hits) < 1
    assert float(nearest_centroid.accuracy(logits)) == pytest.approx(np.mean(hits))


@pytest.mark.parametrize("transform", nearest_centroid.TRANSFORMS)
def test_simpleshot_is_numpys(transform):
    support, query = features(2, 4, 3, 6) + 2, features(3, 4, 5, 6) + 2
    mean = features(4, 6) + 2
    kwargs = {"base_mean": jnp.asarray(mean)} if transform == "CL2N" else {}

    def transformed(x):
        x = x.astype(np.float64) - (mean if transform == "CL2N" else 0)
        return x if transform == "UN" else x / np.linalg.norm(x, axis=-1)[..., None]

    expected = numpy_logits(transformed(support), transformed(query))
    found = nearest_centroid.simpleshot_logits(
        jnp.asarray(support), jnp.asarray(query), transform, **kwargs
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_simpleshot_tells_what_it_needs():
    x = jnp.ones((2, 1, 3))
    with pytest.raises(ValueError, match="CL2N needs base_mean"):
        nearest_centroid.simpleshot_logits(x, x)
    with pytest.raises(ValueError, match="L2N takes no base_mean"):
        nearest_centroid.simpleshot_logits(x, x, "L2N", jnp.ones(3))
    with pytest.raises(ValueError, match="one of UN, L2N, CL2N, got 'l2'"):
        nearest_centroid.simpleshot_logits(x, x, "l2")


def test_features_of_no_length_stay_finite():
    mean = jnp.array([1.0, 2.0])
    value, slope = jax.value_and_grad(
        lambda x: nearest_centroid.simpleshot_transform(x, "CL2N", mean).sum()
    )(mean)
    assert float(value) == 0
    assert bool(jnp.all(jnp.isfinite(slope)))


@pytest.mark.parametrize(
    "logits_fn",
    [
        nearest_centroid.protonet_logits,
        lambda s, q: nearest_centroid.simpleshot_logits(s, q, "L2N"),
        lambda s, q: nearest_centroid.simpleshot_logits(s, q, "CL2N", jnp.ones(6)),
    ],
)
def test_permuted_classes_permute_predictions(logits_fn):
    support, query = (
        jnp.asarray(features(5, 4, 3, 6)),
        jnp.asarray(features(6, 4, 5, 6)),
    )
    order = np.array([2, 0, 3, 1])
    logits = logits_fn(support, query)
    permuted = logits_fn(support[order], query[order])
    np.testing.assert_array_equal(permuted, logits[order][..., order])
    assert nearest_centroid.accuracy(permuted) == nearest_centroid.accuracy(logits)
    # Of the same queries: a prediction names the same class in the new order.
    named = order[np.argmax(logits_fn(support[order], query), -1)]
    np.testing.assert_array_equal(named, np.argmax(logits, -1))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"got \(2, 1, 3\) and \(2, 1, 4\)"):
        nearest_centroid.protonet_logits(jnp.ones((2, 1, 3)), jnp.ones((2, 1, 4)))
    with pytest.raises(ValueError, match=r"got \(3, 1, 3\) for a support of \(2, 1, 3"):
        nearest_centroid.protonet_loss(jnp.ones((2, 1, 3)), jnp.ones((3, 1, 3)))


def test_the_interval_covers_the_mean_19_times_in_20():
    rng = np.random.default_rng(0)
    found = [
        episodes.interval(rng.binomial(75, 0.7, size=100) / 75) for _ in range(2000)
    ]
    covered = np.mean([abs(mean - 0.7) <= half for mean, half in found])
    assert covered == pytest.approx(0.945, abs=0.02)
    with pytest.raises(ValueError, match=r"two or more tasks, got .* shape \(1,\)"):
        episodes.interval(np.array([0.5]))
