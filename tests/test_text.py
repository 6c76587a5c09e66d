"""A decoder of bytes: losses by hand, causality, pieces, and few compilations."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import fast_jit
from hypothesis import given
from hypothesis import strategies as st

import fgrad
from experiments import starts
from experiments.configs import quickstart
from experiments.configs import text as text_config
from experiments.data import texts
from experiments.drivers import settings, text_table
from experiments.learners import next_byte
from experiments.models import decoder
from experiments.usage import UsageError
from fgrad import layers

TABLE = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)


def bigrams(tokens):
    """Logits that depend on the last byte alone."""
    return jnp.asarray(TABLE)[tokens]


def by_hand(sequence: bytes) -> list[float]:
    """The loss of each byte after a newline, in float64."""
    losses, last = [], 10
    for byte in sequence:
        row = TABLE[last].astype(np.float64)
        losses.append(math.log(np.exp(row).sum()) - row[byte])
        last = byte
    return losses


# ---------------------------------------------------------------------------- losses


def test_the_loss_of_each_byte_by_hand():
    tokens = texts.padded([b"cat", b"a horse"], [8])
    found = np.asarray(next_byte.byte_losses(bigrams, tokens))
    np.testing.assert_allclose(found[0, :3], by_hand(b"cat"), rtol=1e-5)
    np.testing.assert_allclose(found[1, :7], by_hand(b"a horse"), rtol=1e-5)
    assert not found[0, 3:].any()
    whole = by_hand(b"cat") + by_hand(b"a horse")
    np.testing.assert_allclose(
        next_byte.mean_loss(bigrams, tokens), np.mean(whole), rtol=1e-5
    )


def test_words_alone_count_and_the_likeliest_is_the_class():
    lines, words = [b"x = 1", b"a b"], [b"no", b"maybe"]
    tokens, counted = next_byte.prompted(lines, words, [16])
    ends = [
        by_hand(line + b"\n= " + word)[-len(word) :]
        for line, word in zip(lines, words, strict=True)
    ]
    np.testing.assert_allclose(
        next_byte.mean_loss(bigrams, tokens, counted),
        np.mean(np.concatenate(ends)),
        rtol=1e-5,
    )
    losses = np.asarray(next_byte.byte_losses(bigrams, tokens))
    np.testing.assert_allclose(
        next_byte.word_scores(losses, counted), [-np.mean(one) for one in ends], 1e-5
    )


def test_nats_and_accuracy_of_a_split_by_hand():
    words = (b"no", b"maybe")
    lines = [b"x = 1", b"a b", b"while true"]
    classes = np.array([0, 1, 1])
    right = [words[number] for number in classes]
    grouped = text_table._grouped(lines, [12, 24], right)
    task = text_table.Task({}, {}, grouped, words, {"test": (lines, classes)})
    losses = fast_jit(lambda batch: next_byte.byte_losses(bigrams, batch.tokens))
    found = text_table.scored(losses, task, "test", 24)

    def of_word(line, word):
        return by_hand(line + b"\n= " + word)[-len(word) :]

    each = [of_word(*pair) for pair in zip(lines, right, strict=True)]
    np.testing.assert_allclose(found["nats"], np.mean(np.concatenate(each)), rtol=1e-5)
    guessed = [
        np.argmin([np.mean(of_word(line, word)) for word in words]) for line in lines
    ]
    assert found["accuracy"] == np.mean(guessed == classes)


# --------------------------------------------------------------------------- decoder


def small(**settings):
    return decoder.Decoder(width=8, depth=1, num_heads=2, mlp_width=12, **settings)


def small_params(seed=0):
    init = fast_jit(small().init)
    params = init(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32))["params"]
    # The first table is so small that no byte would change much.
    return jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, params)


def test_no_byte_sees_what_comes_after_it():
    params, apply = small_params(), fast_jit(small().apply)
    tokens = jnp.array([[7, 8, 9, 10, 11, 12]])
    before = apply({"params": params}, tokens)
    for place in range(6):
        after = apply({"params": params}, tokens.at[0, place].set(200))
        changed = np.abs(after - before).max(axis=(0, 2)) > 1e-6
        assert list(changed) == [False] * place + [True] * (6 - place)


def test_16w8a_is_close_to_float():
    params = small_params()
    tokens = jax.random.randint(jax.random.key(1), (4, 12), 1, 256)
    expected = fast_jit(small().apply)({"params": params}, tokens)
    model = small(bits=(16, 8))
    quantized = {"params": fgrad.quantize(params)}
    variables = fast_jit(functools.partial(layers.calibrate, model))(quantized, tokens)
    found = fast_jit(model.apply)(variables, tokens)
    error = np.sqrt(np.mean((found - expected) ** 2) / np.var(expected))
    assert error < 0.05


def test_checkpoints_do_not_change_the_gradient():
    params, tokens = small_params(), jnp.arange(12).reshape(2, 6)

    def gradient(**settings):
        def loss(params):
            logits = small(**settings).apply({"params": params}, tokens)
            return jnp.mean(logits**2)

        return fast_jit(jax.grad(loss))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        gradient(),
        gradient(checkpointed=True),
    )


def test_a_text_longer_than_the_positions_is_refused():
    with pytest.raises(ValueError, match="96 positions, got 97"):
        small().init(jax.random.key(0), jnp.zeros((1, 97), jnp.int32))


# ----------------------------------------------------------------------------- texts


@given(st.text(st.sampled_from("ab \n"), max_size=60), st.integers(1, 9))
def test_pieces_are_the_text_without_blank_lines(text, longest):
    found = texts.pieces(text, longest)
    lines = [line.rstrip() for line in text.split("\n") if line.strip()]
    assert b"".join(found) == "".join(f"{line}\n" for line in lines).encode()
    assert all(0 < len(piece) <= longest for piece in found)


def test_no_piece_is_in_two_splits():
    found = [b"%d" % (i % 70) for i in range(100)]
    splits = texts.divided(found)
    assert {name: len(part) for name, part in splits.items()} == {
        "train": 56,
        "validation": 7,
        "test": 7,
    }
    together = [piece for part in splits.values() for piece in part]
    assert sorted(together) == sorted(set(found))


@pytest.mark.parametrize("domain", texts.DOMAINS)
def test_every_domain_has_a_text(domain):
    text = texts.read(domain)
    assert len(text) > 20_000
    assert text.isascii()
    assert "\0" not in text  # the padding
    word = {"prose": "statement", "python": "def ", "c": "#define"}.get(domain, "var ")
    assert word in text


def test_buckets_and_what_does_not_fit():
    assert [texts.bucket(n, [32, 8, 16]) for n in (1, 8, 9, 32)] == [8, 8, 16, 32]
    with pytest.raises(ValueError, match="33 bytes does not fit"):
        texts.padded([b"a" * 33], [32, 8])
    with pytest.raises(ValueError, match="domain must be"):
        texts.read("poems")


def test_buckets_are_drawn_as_often_as_they_are_full():
    grouped = text_table._grouped([b"abc"] * 30 + [b"abcdef"] * 10, [4, 8])
    random = np.random.default_rng(0)
    batches = [text_table.drawn(random, grouped, 5) for _ in range(400)]
    short = [batch.tokens.shape == (5, 4) for batch in batches]
    assert all(batch.tokens.shape in {(5, 4), (5, 8)} for batch in batches)
    assert abs(np.mean(short) - 0.75) < 0.08  # 3.7 standard deviations


# -------------------------------------------------------------------------- training


@pytest.fixture
def training(monkeypatch, tmp_path):
    """Runs of a small decoder on a text of lines of all lengths."""
    monkeypatch.setattr(
        text_table,
        "_network",
        lambda bits=None, checkpointed=False: small(
            bits=tuple(bits) if bits else None, checkpointed=checkpointed
        ),
    )
    config = text_config.get_config("smoke")
    config.buckets = (8, 16)
    lines = [b"ab" * (1 + i % 8) for i in range(40)]
    grouped = text_table._grouped(lines, config.buckets)
    task = text_table.Task(grouped, grouped, grouped)

    def made(name, **changes):
        method = quickstart.changed(config.methods[name], changes)
        return text_table._Training(config, method, small_params(), task, tmp_path)

    return made, task


def test_lengths_that_vary_compile_a_step_per_bucket(training):
    made, task = training
    one = made("lora_backprop", batch_size=3)
    assert sorted(task.train) == [8, 16]
    before = one._scores(one._begun(0)[0], "test")["nats"]
    after = one._scores(one._trained(3e-2, 0, 12), "test")["nats"]
    assert one.compilations == 2
    assert after < before - 0.3


def test_lora_begins_as_the_network(training):
    made, task = training
    one = made("lora_fp32")
    trained, frozen = one._begun(3)
    assert {name.split("/")[-2] for name in trained} == {"query", "value"}
    batch = task.train[8]
    found = fast_jit(one._losses)(trained, frozen, {}, batch)
    logits = text_table._logits(small(), small_params(), {})
    expected = fast_jit(lambda x: next_byte.byte_losses(logits, x))(batch.tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_smoke(training, tmp_path, monkeypatch):
    del training  # its network
    monkeypatch.setattr(starts, "committed", lambda config: None)
    config = text_config.get_config("smoke")
    config.run, config.tasks = ("lora_8w8a",), ("kinds",)
    config.lines = {"train": 8, "validation": 4, "test": 4}
    config.pretrain.steps = 1
    found = text_table.run(config, str(tmp_path))["kinds"]
    assert set(found) == {"start", "lora_8w8a"}
    assert found["lora_8w8a"]["weights"] == 2 * (
        8 * 2 + 2 * 8
    )  # D and U, of two kernels
    assert found["lora_8w8a"]["compilations"] <= 2
    assert all(0 <= x <= 1 for x in found["lora_8w8a"]["accuracy"])
    assert "lora_8w8a" in (tmp_path / "table.md").read_text()
    # What is kept is not computed again.
    monkeypatch.setattr(text_table._Training, "_trained", None)
    assert text_table.run(config, str(tmp_path))["kinds"] == found


def test_the_committed_start_knows_english():
    params = starts.committed(text_config.get_config())
    shapes = jax.eval_shape(
        decoder.Decoder().init, jax.random.key(0), np.zeros((1, 4), np.int32)
    )
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, shapes["params"])
    logits = text_table._logits(decoder.Decoder(), params, {})
    mean = fast_jit(lambda tokens: next_byte.mean_loss(logits, tokens))
    losses = [
        float(mean(texts.padded([one], [32])))
        for one in (
            b"the value of the expression.\n",
            b"zqj vxk wqz pfq xjv kqw zzv.\n",
        )
    ]
    assert losses[0] < 2.2 < 4 < losses[1]


def test_the_configuration_is_checked_before_any_work():
    def broken(**changes):
        config = text_config.get_config("smoke")
        config.update(changes)
        return config

    settings.check_text(broken())
    with pytest.raises(UsageError, match="no domain of texts 'poems'"):
        settings.check_text(broken(target="poems"))
    with pytest.raises(UsageError, match="buckets must be"):
        settings.check_text(broken(buckets=(64, 128)))
