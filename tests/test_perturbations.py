import functools
import hashlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from lanes import some

from fgrad import evaluation, fixed_point, perturbations
from fgrad.leaves import Plan, Policy
from fgrad.leaves import plan as plans

SIZE = 2**20
SIGMAS = 5  # one false alarm in two million; the seeds are fixed besides

DISTRIBUTIONS = {
    "normal": perturbations.normal(),
    "normal_z_max": perturbations.normal(z_max=3.5),
    "normal_4_bits": perturbations.normal(bits=4),
    "rademacher": perturbations.rademacher(),
    "binomial": perturbations.binomial(),
}
NORMALS = {"normal": 127, "normal_z_max": 127, "normal_4_bits": 7}  # largest integer
STEPS = {
    "normal": 2.0**-5,
    "normal_z_max": 3.5 / 127,
    "normal_4_bits": 0.5,
    "rademacher": 1.0,
    "binomial": 0.5,
}
every_distribution = pytest.mark.parametrize("name", DISTRIBUTIONS)
# The normals differ by a table and a step only.
every_sampler = pytest.mark.parametrize("name", ["normal", "rademacher", "binomial"])
SHAPES = [(), (1,), (5,), (3, 0), (2, 3, 5)]


# For tests whose time is compilation: the compiler may take it easy.
jit_quickly = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def exact_distribution(name):
    """All values of z_q and their probabilities."""
    if name == "rademacher":
        return np.array([-1, 1]), np.array([0.5, 0.5])
    if name == "binomial":
        ways = np.array([math.comb(16, ones) for ones in range(17)])
        return np.arange(-8, 9), ways / 2**16
    table = perturbations._normal_table(STEPS[name], NORMALS[name])
    values, counts = np.unique(table.astype(np.int64), return_counts=True)
    return values, counts / 256


def exact_moment(name, order):
    values, probabilities = exact_distribution(name)
    return np.sum(probabilities * (values * STEPS[name]) ** order)


def z_of(name, path="w", step=0, index=0, shape=(SIZE,), seed=0):
    key = perturbations.sample_key(jax.random.key(seed), step, index)
    key = perturbations.leaf_keys(key, [path])[path]
    return DISTRIBUTIONS[name].sample(key, shape)


@functools.cache
def compiled(name, path):
    return jax.jit(lambda step, index: z_of(name, path, step, index))


@functools.cache
def many(name, path="w", step=0, index=0):
    """About 10**6 values of z_q, as float64 integers."""
    return np.asarray(compiled(name, path)(step, index)).astype(np.float64)


# --------------------------------------------------------------------- distributions


@every_distribution
def test_z_is_int8_on_its_grid_and_takes_every_value_of_its_distribution(name):
    z = compiled(name, "w")(0, 0)
    assert z.dtype == jnp.int8
    assert DISTRIBUTIONS[name].step == STEPS[name]
    values, _ = exact_distribution(name)
    np.testing.assert_array_equal(np.unique(z), values)


@pytest.mark.parametrize("name", NORMALS)
def test_the_256_values_of_a_normal_z_have_zero_mean_and_unit_variance(name):
    step = STEPS[name]
    table = perturbations._normal_table(step, NORMALS[name]).astype(np.int64)
    assert table.shape == (256,)
    assert np.abs(table).max() <= NORMALS[name]
    # Mirrored, so the mean is zero exactly, and so is every odd moment.
    np.testing.assert_array_equal(table, -table[::-1])
    assert (np.diff(table) >= 0).all()
    # A stair of the variance, one mirrored pair moving by one from at most 2.9 / step,
    # is 2 ((k + 1)² - k²) step² / 256 high and half of it may be missed; the search
    # for the scale, in steps of 5e-4, misses 2 * 5e-4 / 2 more.
    stair = 2 * (2 * 2.9 * step + step**2) / 256
    assert abs(np.mean((table * step) ** 2.0) - 1) <= stair / 2 + 5e-4
    # The kurtosis that the docstring states is 2.9; coarse grids move it by a stair.
    assert abs(np.mean((table * step) ** 4.0) - 2.9) <= 0.03 + step / 4


@pytest.mark.parametrize("name", NORMALS)
def test_the_256_values_of_a_normal_z_are_its_quantiles(name):
    table = np.sort(exact_table(name))
    quantiles = scipy.stats.norm.ppf((np.arange(256) + 0.5) / 256)
    # Rounding to the grid, and the scale that restores the variance: within 10%.
    error = np.abs(table - quantiles)
    assert (error <= STEPS[name] / 2 + 0.1 * np.abs(quantiles) + 1e-12).all()


def exact_table(name):
    return perturbations._normal_table(STEPS[name], NORMALS[name]) * STEPS[name]


def test_rademacher_and_binomial_have_unit_variance_exactly():
    for name in ("rademacher", "binomial"):
        assert exact_moment(name, 1) == 0
        assert exact_moment(name, 2) == 1


@every_distribution
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_sample_moments_are_those_of_the_distribution(name, order):
    sample = np.mean((many(name) * STEPS[name]) ** order)
    expected = exact_moment(name, order)
    variance = exact_moment(name, 2 * order) - expected**2
    # Exact where the power is constant, as for rademacher; 1e-12 for float64 sums.
    assert abs(sample - expected) <= SIGMAS * math.sqrt(variance / SIZE) + 1e-12


@every_distribution
def test_sample_mean_variance_and_kurtosis_are_near_normal(name):
    z = many(name) * STEPS[name]
    fourth, eighth = exact_moment(name, 4), exact_moment(name, 8)
    # The distribution's own distance from 0 and 1, tested above, and five standard
    # errors of the sample.
    assert abs(z.mean()) <= SIGMAS / math.sqrt(SIZE)
    bias = abs(exact_moment(name, 2) - 1)
    assert bias < 0.003
    assert abs(z.var() - 1) <= bias + SIGMAS * math.sqrt(fourth / SIZE)
    kurtosis = {"rademacher": 1.0, "binomial": 3 - 2 / 16}.get(name, 2.9)
    error = abs(np.mean(z**4) - kurtosis)
    assert error <= 0.12 + SIGMAS * math.sqrt((eighth - fourth**2) / SIZE)


@every_distribution
def test_value_counts_pass_a_chi_square_test(name):
    values, probabilities = exact_distribution(name)
    counts = np.array([np.sum(many(name) == v) for v in values])
    assert counts.sum() == SIZE
    # 1e-6 is five standard deviations; a biased table or bit would give 1e-100.
    assert scipy.stats.chisquare(counts, probabilities * SIZE).pvalue > 1e-6


GENERATORS = [perturbations.counter_hash, perturbations.threefry_words]
every_generator = pytest.mark.parametrize("generator", GENERATORS)


def random_bytes(generator, key, words):
    """uint8 [words, 4]."""
    indices = jnp.arange(words, dtype=jnp.uint32)
    return np.asarray(generator(key, indices)).view(np.uint8).reshape(words, 4)


@every_generator
def test_random_bytes_are_uniform_and_independent_of_their_neighbours(generator):
    octets = random_bytes(generator, jax.random.key(3), SIZE // 4).reshape(-1)
    counts = np.bincount(octets, minlength=256)
    assert scipy.stats.chisquare(counts).pvalue > 1e-6
    for lag in (1, 2, 3, 4, 5, 8):
        # The high and the low four bits of two bytes, in all 256 pairs.
        first, second = octets[:-lag], octets[lag:]
        for pairs in (first & 0xF0 | second >> 4, first << 4 | second & 0xF):
            counts = np.bincount(pairs, minlength=256)
            assert scipy.stats.chisquare(counts).pvalue > 1e-6, lag


@every_generator
def test_every_bit_of_the_random_words_is_fair_and_uncorrelated_with_the_others(
    generator,
):
    words = SIZE // 4
    octets = random_bytes(generator, jax.random.key(4), words)
    # Sums of ±1 below 2**24 are exact in float32.
    bits = np.unpackbits(octets, axis=1).astype(np.float32) * 2 - 1
    limit = SIGMAS / math.sqrt(words - 2)
    assert np.abs(bits.mean(axis=0)).max() <= limit
    for lag in (0, 1, 2):
        # 32 bits of a word with those of the word that follows `lag` places later.
        correlations = bits[: words - lag].T @ bits[lag:] / (words - lag)
        if lag == 0:
            correlations -= np.eye(32)
        assert np.abs(correlations).max() <= limit, lag


def correlations_at_lags(x, y):
    """Means of ``x[i] y[i + lag]`` over the standard deviations, lag from 0 to 64."""
    x, y = x - x.mean(), y - y.mean()
    # All lags at once: the inverse of the cross power, padded against wrapping.
    power = np.conj(np.fft.rfft(x, 2 * SIZE)) * np.fft.rfft(y, 2 * SIZE)
    sums = np.fft.irfft(power)[:65]
    np.testing.assert_allclose(sums[3], np.sum(x[:-3] * y[3:]), atol=1e-3)
    return sums / SIZE / (x.std() * y.std())


@every_distribution
@pytest.mark.parametrize("power", [1, 2])
def test_z_and_its_square_are_uncorrelated_with_themselves_at_lags(name, power):
    if name == "rademacher" and power == 2:
        pytest.skip("the square is constant")
    z = many(name) ** power
    correlations = correlations_at_lags(z, z)
    assert correlations[0] == pytest.approx(1)
    # Each is a mean of about SIZE products of unit variance.
    assert np.abs(correlations[1:]).max() <= SIGMAS / math.sqrt(SIZE)


OTHER_ADDRESSES = [
    {"path": "w2"},
    {"step": 1},
    {"step": 2},
    {"index": 1},
    {"index": 2},
    {"step": 1, "index": 1},
]


@every_distribution
def test_z_is_uncorrelated_between_leaves_steps_and_indices(name):
    samples = np.stack([many(name, **address) for address in [{}, *OTHER_ADDRESSES]])
    samples -= samples.mean(axis=1, keepdims=True)
    samples /= samples.std(axis=1, keepdims=True)
    between = samples @ samples.T / SIZE - np.eye(len(samples))
    assert np.abs(between).max() <= SIGMAS / math.sqrt(SIZE)


@pytest.mark.parametrize("address", OTHER_ADDRESSES[:4])
def test_z_is_uncorrelated_with_that_of_another_address_at_lags(address):
    z, other = many("normal"), many("normal", **address)
    for pair in ((z, other), (other, z), (z**2, other**2)):
        correlations = correlations_at_lags(*pair)
        assert np.abs(correlations).max() <= SIGMAS / math.sqrt(SIZE)


@every_sampler
def test_one_weight_sees_independent_z_at_consecutive_steps(name):
    """What a training run averages over: the same few weights, step after step."""
    steps, size = SIZE // 16, 16
    z = jax.jit(jax.vmap(lambda step: z_of(name, step=step, shape=(size,))))(
        jnp.arange(steps)
    )
    z = np.asarray(z).astype(np.float64)
    values, probabilities = exact_distribution(name)
    for weight in (0, 1, size - 1):
        counts = np.array([np.sum(z[:, weight] == v) for v in values])
        # Values expected less than five times are counted together, for chi-square.
        rare = probabilities * steps < 5
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(probabilities[~rare], probabilities[rare].sum()) * steps
        if not rare.any():
            counts, expected = counts[:-1], expected[:-1]
        assert scipy.stats.chisquare(counts, expected).pvalue > 1e-6
    z /= z.std(axis=0)
    for lag in (1, 2, 3, 4, 8, 64):
        # Of each weight with itself and all others, `lag` steps later.
        correlations = z[:-lag].T @ z[lag:] / (steps - lag)
        assert np.abs(correlations).max() <= SIGMAS / math.sqrt(steps - lag)
    same_step = z.T @ z / steps - np.eye(size)
    # The diagonal is 1 but for the mean, which is a standard error itself, squared.
    assert np.abs(same_step).max() <= SIGMAS / math.sqrt(steps)


# ------------------------------------------------------------------------ addressing


@every_sampler
def test_the_same_address_gives_the_same_z_under_jit_scan_and_vmap(name):
    def sample(step):
        return z_of(name, step=step, index=step + 1, shape=(100,))

    @jit_quickly
    def transformed(steps):
        return sample(steps[1]), jax.vmap(sample)(steps), jax.lax.map(sample, steps)

    eager = [sample(step) for step in range(3)]
    jitted, mapped, scanned = transformed(jnp.arange(3))
    np.testing.assert_array_equal(jitted, eager[1])
    np.testing.assert_array_equal(mapped, eager)
    np.testing.assert_array_equal(scanned, eager)
    np.testing.assert_array_equal(sample(np.int64(2)), eager[2])


@every_sampler
def test_another_step_index_path_or_key_gives_another_z(name):
    addresses = [{}, {"step": 1}, {"index": 1}, {"path": "v"}, {"seed": 1}]
    # The roles are not interchangeable: (step, index) = (1, 0) is not (0, 1).
    samples = {np.asarray(z_of(name, **a, shape=(100,))).tobytes() for a in addresses}
    assert len(samples) == len(addresses)


@every_sampler
@pytest.mark.parametrize("flipped", [[1, 0], [0, 1], [2**31, 0], [0, 2**31]])
def test_every_word_of_the_key_decides_on_z(name, flipped):
    words = np.array([123456789, 987654321], np.uint32)
    sample = jax.jit(lambda w: DISTRIBUTIONS[name].sample(w, (2**16,)))
    first, second = sample(words), sample(words ^ np.array(flipped, np.uint32))
    correlation = np.corrcoef(first, second)[0, 1]
    assert abs(correlation) <= SIGMAS / 2**8


@every_sampler
def test_old_and_new_keys_address_the_same_z(name):
    key = jax.random.key(7)
    sample = DISTRIBUTIONS[name].sample
    raw = sample(jax.random.key_data(key), (100,))
    np.testing.assert_array_equal(sample(key, (100,)), raw)


@every_sampler
def test_odd_shapes_have_int8_values_on_the_grid(name):
    samples = jit_quickly(lambda: [z_of(name, shape=shape) for shape in SHAPES])()
    values, _ = exact_distribution(name)
    for z, shape in zip(samples, SHAPES, strict=True):
        assert z.shape == shape
        assert z.dtype == jnp.int8
        assert np.isin(z, values).all()
    np.testing.assert_array_equal(samples[2], z_of(name, shape=SHAPES[2]))


def z_by_leaf(name, params, mask=None):
    """z of each leaf of zeros, as `evaluation.perturb` adds it with a unit epsilon."""
    key = perturbations.sample_key(jax.random.key(5), 3, 1)
    perturb = functools.partial(evaluation.perturb, mask=mask)
    return jit_quickly(lambda p: perturb(p, key, 1.0, DISTRIBUTIONS[name]))(params)


@every_sampler
def test_z_of_a_leaf_does_not_depend_on_the_other_leaves(name):
    few = {"block": {"kernel": jnp.zeros((3, 4)), "bias": jnp.zeros(4)}}
    more = {
        "a": jnp.zeros(11),
        "block": {"adapter": jnp.zeros((2, 2)), **few["block"]},
        "z": [jnp.zeros(1), jnp.zeros(())],
    }
    small, large = z_by_leaf(name, few), z_by_leaf(name, more)
    for leaf in ("kernel", "bias"):
        np.testing.assert_array_equal(small["block"][leaf], large["block"][leaf])
        assert np.abs(small["block"][leaf]).max() > 0


@every_sampler
def test_z_of_a_leaf_does_not_depend_on_a_mask(name):
    params = {"a": jnp.zeros(7), "b": {"c": jnp.zeros((5, 2)), "d": jnp.zeros(40)}}
    full = z_by_leaf(name, params)
    mask = {"a": False, "b": {"c": True, "d": False}}
    masked = z_by_leaf(name, params, mask)
    np.testing.assert_array_equal(masked["b"]["c"], full["b"]["c"])
    assert not np.asarray(masked["a"]).any()
    assert not np.asarray(masked["b"]["d"]).any()
    assert np.asarray(full["a"]).any()


@every_sampler
def test_perturb_adds_the_z_of_the_documented_address(name):
    z = z_by_leaf(name, {"outer": {"w": jnp.zeros((6, 5))}})["outer"]["w"]
    key = perturbations.sample_key(jax.random.key(5), 3, 1)
    path = "['outer']['w']"  # jax.tree_util.keystr
    key = perturbations.leaf_keys(key, [path])[path]
    expected = DISTRIBUTIONS[name].sample(key, (6, 5))
    np.testing.assert_array_equal(z, expected * np.float32(STEPS[name]))


@every_sampler
def test_a_quantized_leaf_gets_the_z_of_the_float_leaf_at_its_path(name):
    floats = {"w": jnp.zeros((8, 9))}
    # No z is larger than 4, so nothing is clipped.
    quantized = fixed_point.quantize(floats, headroom=1.0, zero_bound=4.0)
    moved = z_by_leaf(name, quantized)["w"]
    z = np.asarray(z_by_leaf(name, floats)["w"])
    # ε_q is rounded to a whole grid step, as the result is: half a step for each unit
    # of |z| <= 4 and half a step for the sum.
    assert np.abs(z).max() <= 4
    steps = z.astype(np.float64) / float(moved.scale)
    assert np.abs(np.asarray(moved.qvalue) - steps).max() <= 0.5 * 4 + 0.5


@every_sampler
def test_a_mask_that_trains_nothing_changes_nothing(name):
    params = {"a": jnp.arange(3.0)}
    unchanged = z_by_leaf(name, params, mask=False)
    np.testing.assert_array_equal(unchanged["a"], params["a"])


def test_z_depends_on_the_whole_path_not_on_the_last_name():
    params = {"a": {"w": jnp.zeros(64)}, "b": {"w": jnp.zeros(64)}, "w": jnp.zeros(64)}
    z = z_by_leaf("normal", params)
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(z)]
    assert len(set(leaves)) == 3


@pytest.mark.parametrize(
    "params",
    [
        {"a": {"b": jnp.zeros(64)}, "a/b": jnp.zeros(64)},  # both are a/b in short
        {"plumless": jnp.zeros(64), "buckeroo": jnp.zeros(64)},  # the same CRC-32
    ],
)
def test_leaves_whose_names_are_easily_confused_do_not_share_z(params):
    first, second = jax.tree.leaves(z_by_leaf("normal", params))
    correlation = np.corrcoef(first, second)[0, 1]
    assert abs(correlation) <= SIGMAS / math.sqrt(64)


def test_leaf_keys_fold_in_64_bits_of_the_hash_of_each_name():
    names = ["['layer']['w']", "", "Δ", "['layer']['b']"]
    key = jax.random.key(11)
    got = perturbations.leaf_keys(key, names)
    assert got.names == tuple(names)
    for name in names:
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        expected = key
        for word in (digest[:4], digest[4:]):
            expected = jax.random.fold_in(expected, int.from_bytes(word, "little"))
        np.testing.assert_array_equal(
            jax.random.key_data(got[name]), jax.random.key_data(expected)
        )


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": 9}, ValueError, "has 3 to 8 bits"),
        ({"bits": 2}, ValueError, "has 3 to 8 bits"),
        ({"bits": 1}, ValueError, "bits must lie in"),
        ({"bits": 0}, ValueError, "bits must lie in"),
        ({"bits": 4.0}, TypeError, "bits must be an integer"),
        ({"bits": True}, TypeError, "bits must be an integer"),
        ({"z_max": 1.0}, ValueError, "must be finite and at least 2"),
        (
            {"z_max": math.nextafter(2, 0)},
            ValueError,
            "must be finite and at least 2",
        ),
        ({"z_max": -3.5}, ValueError, "must be finite and at least 2"),
        ({"z_max": math.inf}, ValueError, "must be finite and at least 2"),
        ({"z_max": math.nan}, ValueError, "must be finite and at least 2"),
        ({"bits": 3, "z_max": 3.5}, ValueError, r"makes 1\.0 = 1\.167"),
        ({"bits": 4, "z_max": 3.0}, ValueError, r"makes 1\.0 = 0\.857"),
        ({"z_max": 1000.0}, ValueError, r"makes 1\.0 = 0\.000"),
    ],
)
def test_normal_raises_for_impossible_options(options, error, message):
    with pytest.raises(error, match=message):
        perturbations.normal(**options)


@pytest.mark.parametrize("bits", range(3, 9))
def test_the_default_step_makes_one_a_whole_number_of_steps(bits):
    perturbation = perturbations.normal(bits=bits)
    assert perturbation.step == 2.0 ** (3 - bits)
    assert float(1 / perturbation.step).is_integer()


def test_names_tell_how_a_perturbation_was_constructed():
    assert perturbations.normal().name == "normal()"
    assert perturbations.normal(bits=4).name == "normal(bits=4, z_max=None)"
    assert perturbations.normal(z_max=3.5).name == "normal(bits=8, z_max=3.5)"
    assert perturbations.rademacher().name == "rademacher()"
    assert perturbations.binomial().name == "binomial()"


# The smallest and coarse settings that are accepted.
@pytest.mark.parametrize(
    ("bits", "z_max"), [(8, 2.0), (7, 2.0), (8, 8.0), (5, 2.5), (3, None), (3, 3.0)]
)
def test_every_setting_that_is_accepted_has_unit_variance(bits, z_max):
    step = perturbations.normal(bits, z_max).step
    table = perturbations._normal_table(step, 2 ** (bits - 1) - 1) * step
    # 1.0000 at z_max=2; the coarsest grid, three integers a side, gives 0.992.
    assert abs(np.mean(table**2) - 1) < (0.002 if step < 0.5 else 0.01)
    assert abs(np.mean(table)) < 1e-12


# ------------------------------------------------------------------------ generators


@every_generator
def test_words_depend_on_key_and_index_only(generator):
    key = jax.random.key(5)
    words = generator(key, jnp.arange(100, dtype=jnp.uint32))
    np.testing.assert_array_equal(
        generator(key, jnp.array([70, 3], jnp.uint32)), words[jnp.array([70, 3])]
    )
    assert np.all(
        words != generator(jax.random.key(6), jnp.arange(100, dtype=np.uint32))
    )


def test_threefry_words_are_those_of_the_published_cipher():
    # Known answer of Threefry-2x32, 20 rounds, from the Random123 distribution.
    key = jnp.array([0x13198A2E, 0x03707344], jnp.uint32)
    counter = jnp.array([0x243F6A88], jnp.uint32)
    x = jax.extend.random.threefry_2x32(
        key, jnp.array([0x243F6A88, 0x85A308D3], "uint32")
    )
    assert [hex(v) for v in np.asarray(x)] == ["0xc4923a9c", "0x483df7a0"]
    expected = jax.extend.random.threefry_2x32(
        key, jnp.array([0x243F6A88, 0], "uint32")
    )
    assert perturbations.threefry_words(key, counter)[0] == expected[0]


@every_generator
@pytest.mark.parametrize("name", ["normal", "rademacher", "binomial"])
def test_the_generator_is_selectable(generator, name):
    z = getattr(perturbations, name)(generator=generator)
    sample = np.asarray(z.sample(jax.random.key(0), (2**14,)), np.float64) * z.step
    assert abs(sample.mean()) < SIGMAS / 2**7
    assert abs(sample.var() - 1) < SIGMAS * math.sqrt(2) / 2**7
    default = getattr(perturbations, name)().sample(jax.random.key(0), (2**14,))
    same = generator is perturbations.counter_hash
    assert np.array_equal(sample, np.asarray(default) * z.step) is same


# ---------------------------------------------------------------------------- blocks

WITH_LOW_RANK = {
    **{name: DISTRIBUTIONS[name] for name in ("normal", "rademacher", "binomial")},
    "low_rank": perturbations.low_rank(3),
    "threefry": perturbations.normal(generator=perturbations.threefry_words),
}
with_low_rank = some(WITH_LOW_RANK, ["normal", "low_rank"])


@pytest.mark.parametrize("name", with_low_rank)
@pytest.mark.parametrize("shape", [(3, 7), (4, 8), (1,), (33,)])
def test_a_block_is_that_part_of_the_leaf(name, shape):
    z, key = WITH_LOW_RANK[name], jax.random.key(7)
    leaf = np.asarray(z.sample(key, (2, 5, *shape)))
    block = jax.jit(lambda i: z.sample(key, shape, i))
    for i in range(2):
        for j in range(5):
            np.testing.assert_array_equal(block(i * 5 + j), leaf[i, j])
    # One level up the blocks have an axis more.
    np.testing.assert_array_equal(z.sample(key, (5, *shape), 1), leaf[1])


@pytest.mark.parametrize("per_word", [1, 2, 4, 32])
def test_the_place_of_a_block_is_exact_beyond_32_bits(per_word):
    random = np.random.default_rng(per_word)
    for size in (1, per_word, 7, 12, 4096, 2**24 + 5, 2**31 - 1):
        # Blocks that start within 2**32 words: the first, the last and some others.
        last = (2**32 * per_word - 1) // size
        blocks = [0, 1, last, *random.integers(0, last, 8)]
        for block in (int(x) for x in blocks if x < 2**32):
            found = perturbations.word_of_block(np.uint32(block), size, per_word)
            assert tuple(map(int, found)) == divmod(block * size, per_word)


ABSTRACT = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)


def plan_of(leaf, z):
    """Makes a plan of a leaf that has a shape and no values."""
    jax.eval_shape(lambda x: Plan({"w": x}, Policy(perturbation=z)).epsilon, leaf)


@pytest.mark.parametrize(
    ("z", "fits", "too_large"),
    [
        (perturbations.normal(), (2**17, 2**17), (2**17 + 1, 2**17)),
        (perturbations.rademacher(), (2**18, 2**19), (2**18, 2**19, 2)),
        (perturbations.low_rank(), (2**36, 2, 2), (2**36, 4, 2)),
    ],
    ids=["normal", "rademacher", "low rank"],
)
def test_a_leaf_beyond_the_random_words_is_refused(z, fits, too_large):
    plan_of(ABSTRACT(fits), z)
    with pytest.raises(ValueError, match=r"leaf 'w': it has .* before they repeat"):
        plan_of(ABSTRACT(too_large), z)


@pytest.mark.parametrize(
    ("shape", "per_word", "axes"),
    [
        ((16, 8), 4, (16, 2)),
        ((16, 10), 4, (8, 5)),  # words span two rows
        ((3, 4, 10), 4, (3, 2, 5)),
        ((3, 3, 4), 32, None),
        ((4, 2, 3, 4), 8, (4, 1, 3)),
        ((7, 3), 4, None),
        ((), 4, None),
        ((64,), 32, (2,)),
    ],
)
def test_words_have_the_axes_of_their_leaf_where_they_can(shape, per_word, axes):
    assert perturbations._axes_of_words(shape, per_word) == axes


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("shape", [(16, 8), (16, 10), (7, 3)])
def test_the_words_of_a_leaf_are_counted_in_the_order_of_memory(name, shape):
    z, key = DISTRIBUTIONS[name], jax.random.key(7)
    count = -(-math.prod(shape) // z.values_per_word)
    flat = z.decode(z.generator(key, jnp.arange(count, dtype=jnp.uint32)))
    expected = flat[: math.prod(shape)].reshape(shape)
    np.testing.assert_array_equal(z.sample(key, shape), expected)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_values_made_one_by_one_are_those_of_the_words(name):
    z, key = DISTRIBUTIONS[name], jax.random.key(7)
    for shape in ((5, 3, 6), (64,), ()):
        whole = z.sample(key, (4, *shape))
        found = perturbations._sample_values(z, (4, *shape), key, None)
        np.testing.assert_array_equal(found, whole)
        for block in (1, 3):
            found = perturbations._sample_values(z, shape, key, jnp.int32(block))
            np.testing.assert_array_equal(found, whole[block])


def test_values_are_made_one_by_one_where_a_device_has_parts_of_words():
    mesh = jax.sharding.AbstractMesh((2, 4), ("rows", "columns"))
    shapes = {(264, 520): True, (256, 512): False, (9, 15): False, (3, 12): True}
    for shape, cut in shapes.items():
        assert not perturbations._is_cut(shape, 4)
        with jax.sharding.use_abstract_mesh(mesh):
            assert perturbations._is_cut(shape, 4) == cut


@pytest.mark.parametrize("name", WITH_LOW_RANK)
def test_leaves_sampled_together_get_the_z_that_they_get_alone(name):
    z = WITH_LOW_RANK[name]
    keys = jax.random.split(jax.random.key(8), 5)
    shapes = [(40,), (7,), (), (3, 5), (0,)]
    leaves = jax.jit(lambda keys: z.sample_together(keys, shapes))(keys)
    for key, leaf, shape in zip(keys, leaves, shapes, strict=True):
        np.testing.assert_array_equal(leaf, z.sample(key, shape))


@pytest.mark.parametrize("rank", [1, 3])
def test_factors_made_together_are_those_made_alone(rank):
    z = perturbations.low_rank(rank)
    keys, shapes = (
        jax.random.split(jax.random.key(8), 4),
        [(4, 70), (5,), (), (2, 3, 4)],
    )
    pairs = z.factors_together(keys, shapes)
    for key, pair, shape in zip(keys, pairs, shapes, strict=True):
        for got, expected in zip(pair, z.factors(key, shape or (1,)), strict=True):
            np.testing.assert_array_equal(got, expected)


def test_samples_made_together_are_stored_and_not_fused_into_their_users():
    z = perturbations.rademacher()

    def function(key, x):
        (b,) = z.sample_together(key[None], [(100,)])
        return x + b

    key, x = jax.random.key(8), jnp.ones((64, 100))
    compiled = jax.jit(function).lower(key, x).compile().as_text()
    users = re.findall(r"^%\S*fused\S* .*?^}", compiled, re.MULTILINE | re.DOTALL)
    adding = [text for text in users if "f32[64,100]" in text]
    assert adding
    multiplier = str(0x7FEB352D)  # of the hash
    assert multiplier in compiled
    assert not any(multiplier in text for text in adding)


@pytest.mark.parametrize("name", with_low_rank)
@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32])
def test_a_weighted_sum_adds_up_the_samples(name, m, dtype):
    z, shape = WITH_LOW_RANK[name], (5, 3, 4)
    keys = jax.random.split(jax.random.key(9), m)
    c = jnp.array([1, -1, 0, 1][:m], dtype)
    expected = sum(
        int(c[i]) * np.asarray(z.sample(keys[i], shape), np.int64) for i in range(m)
    )
    plan = Plan(jnp.zeros(shape), Policy(1.0, m, z))
    total = jax.jit(plan.arithmetic[""].weighted_sum)(keys, c)
    assert total.dtype == dtype
    np.testing.assert_array_equal(total, expected)
    # The same for small leaves, all at once.
    params = {"a": jnp.zeros(shape), "b": jnp.zeros((3, 4, 5))}
    names = ("['a']", "['b']")
    leaf_keys = perturbations.LeafKeys(jnp.stack([keys, keys], axis=1), names)
    arithmetic = Plan(params, Policy(1.0, m, z)).arithmetic
    sums = plans._sums_together(arithmetic, leaf_keys, c)
    np.testing.assert_array_equal(sums[names[0]], expected)
    other = sum(
        int(c[i]) * np.asarray(z.sample(keys[i], (3, 4, 5)), np.int64) for i in range(m)
    )
    np.testing.assert_array_equal(sums[names[1]], other)


# -------------------------------------------------------------------------- low rank


@pytest.mark.parametrize("rank", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (30,)])
def test_low_rank_z_has_zero_mean_unit_variance_and_no_correlations(rank, shape):
    z, draws = perturbations.low_rank(rank), 2**14
    keys = jax.random.split(jax.random.key(10), draws)
    samples = jax.jit(jax.vmap(lambda k: z.sample(k, shape)))(keys)
    assert samples.dtype == jnp.int8
    values = np.asarray(samples, np.float64).reshape(draws, -1) * z.step
    limit = SIGMAS / math.sqrt(draws)
    assert np.abs(values.mean(0)).max() < limit
    covariance = values.T @ values / draws
    # The fourth moment of a sum of r signs over r**0.5 is 3 - 2 / r.
    assert np.abs(np.diag(covariance) - 1).max() <= limit * math.sqrt(2 - 2 / rank)
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < limit * 1.2


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_low_rank_z_has_that_rank_with_the_last_axis_on_one_side(rank):
    z = perturbations.low_rank(rank)
    sample = np.asarray(z.sample(jax.random.key(11), (4, 5, 16)), np.float64)
    assert np.linalg.matrix_rank(sample.reshape(20, 16)) == rank
    assert np.linalg.matrix_rank(sample.transpose(0, 2, 1).reshape(64, 5)) > rank


@pytest.mark.parametrize("rank", [0, 128, 1.0, True])
def test_low_rank_raises_for_an_impossible_rank(rank):
    with pytest.raises(ValueError, match="rank must be an integer from 1 to 127"):
        perturbations.low_rank(rank)
