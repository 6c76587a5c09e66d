"""Keyword networks of int8 that learn new words: data, a cut network, tasks, runs."""

import importlib
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import fgrad
from experiments import main
from experiments.configs import keywords as config_file
from experiments.data import tflite, words
from experiments.data.arrays import Split
from experiments.drivers import keyword_table
from experiments.models import int8_network, keyword
from experiments.usage import UsageError

pytest.importorskip("flatbuffers", reason="writes TFLite files, as fgrad[export] can")
tflite_files = importlib.import_module("tflite_files")

FRAMES, BINS, CHANNELS, BLOCKS = 3, 4, 6, 3


# ------------------------------------------------------------------------------- words


def test_the_splits_of_the_words_share_no_voices():
    everyone = [voice for voices in words.VOICES.values() for voice in voices]
    assert len(set(everyone)) == len(everyone) == 84
    assert len(set(words.WORDS)) == len(words.WORDS) == 20


def test_a_take_is_a_word_in_noise(monkeypatch):
    said = np.sin(np.arange(4000.0))

    def speech(word, voice, speed, pitch):
        assert word == "lamp"
        assert voice.partition("+")[::2] == (voice.partition("+")[0], "f2")
        assert voice.partition("+")[0] in words.ACCENTS
        assert 140 <= speed < 200
        assert 35 <= pitch < 65
        return said.copy()

    monkeypatch.setattr(words, "speech", speech)
    for seed in range(20):
        take = words._take("lamp", "f2", np.random.default_rng(seed))
        assert take.shape == (16_000,)
        assert take.dtype == np.float32
        # Where the word is, by its correlation with what was said.
        place = int(np.argmax(np.correlate(take, said, "valid")))
        assert abs(place - 6000) <= 0.1 * 16_000 + 4  # a period of the tone is six
        inside = take[place : place + 4000]
        outside = np.concatenate([take[: place - 4], take[place + 4004 :]])
        decibels = 10 * np.log10(np.mean(inside**2) / np.mean(outside**2))
        assert 4 < decibels < 27
        assert 0.01 < np.sqrt(np.mean(inside**2)) < 0.2


def test_words_are_spoken_by_the_package():
    pytest.importorskip("espeakng_loader", reason="needs fgrad[keywords]")
    low, high = (words.speech("window", "en+f2", pitch=pitch) for pitch in (0, 99))
    for said in (low, high):
        assert said.dtype == np.float64
        assert 0.3 * 16_000 < len(said) < 16_000
        assert 0.02 < np.sqrt(np.mean(said**2)) < 0.5
    assert not np.array_equal(low, high)
    with pytest.raises(ValueError, match="no voice 'nobody'"):
        words.speech("window", "en+nobody")
    with pytest.raises(ValueError, match="no voice"):
        words.speech("window", "xx-nowhere")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    words._espeak.cache_clear()
    with pytest.raises(ModuleNotFoundError, match="pip install espeakng-loader"):
        words.speech("window", "en+f2")
    monkeypatch.setitem(sys.modules, "pymicro_features", None)
    with pytest.raises(ModuleNotFoundError, match="pip install pymicro-features"):
        keyword.frontend(np.zeros(160, np.int16))
    monkeypatch.setattr(keyword, "_PACKAGE", "no_such_package")
    with pytest.raises(ModuleNotFoundError, match="pip install pymicro-wakeword"):
        keyword.published("alexa")


# --------------------------------------------------------------------- the cut network


def network(split=False):
    """A network as the published ones are, of three blocks, that forgets each step."""
    rng = np.random.default_rng(0)

    def activation(*shape, scale, zero_point=-128):
        grid = {"scale": scale, "zero_point": zero_point}
        return {"shape": shape, "dtype": "int8", **grid}

    tensors = [
        activation(1, FRAMES, BINS, scale=0.1),
        {"shape": (4,), "dtype": "int32", "data": np.int32([1, FRAMES, 1, BINS])},
        activation(1, FRAMES, 1, BINS, scale=0.1),
    ]
    operations = [("RESHAPE", [0, 1], [2], {})]

    def product(name, kernel_shape, axis, out):
        data = rng.integers(-127, 128, kernel_shape).astype(np.int8)
        scale = rng.uniform(0.004, 0.01, kernel_shape[axis]).astype(np.float32)
        bias = rng.integers(-300, 900, kernel_shape[axis]).astype(np.int32)
        first = len(tensors)
        kernel = {"shape": kernel_shape, "dtype": "int8", "data": data}
        tensors.extend(
            [
                {**kernel, "scale": scale, "axis": axis},
                {"shape": bias.shape, "dtype": "int32", "data": bias},
                out,
            ]
        )
        relu = {"activation": 1} if axis == 0 else {}
        strides = {"stride_h": 1, "stride_w": 1, "padding": 1}
        operations.append(
            (name, [first - 1, first, first + 1], [first + 2], {**strides, **relu})
        )

    def hidden(zero_point):
        return activation(1, 1, 1, CHANNELS, scale=0.06, zero_point=zero_point)

    product("CONV_2D", (CHANNELS, FRAMES, 1, BINS), 0, hidden(-128))

    for _ in range(BLOCKS):
        product("DEPTHWISE_CONV_2D", (1, 1, 1, CHANNELS), 3, hidden(3))
        if not split:
            product("CONV_2D", (CHANNELS, 1, 1, CHANNELS), 0, hidden(-128))
    file = tflite_files.write(tensors, operations, [0], [len(tensors) - 1])
    return int8_network.of_graphs(tflite.parse(file))


def steps_of(cut, x):
    """What the frozen layers of a cut network make of int8 inputs."""
    return cut.scale * (np.asarray(cut._streamed(x), float) - cut.zero_point)


def hidden_of(cut, features):
    """The activations behind the last block of a `Tail`."""
    model = keyword.Tail(cut.windows, cut.widths)
    head = {"kernel": jnp.zeros((cut.widths[-1], 10)), "bias": jnp.zeros(10)}
    params = {**fgrad.dequantize(cut.params), keyword.HEAD: head}
    _, found = model.apply({"params": params}, features, capture_intermediates=True)
    last = f"pointwise_{len(cut.windows) - 1}"
    (hidden,) = found["intermediates"][last]["__call__"]
    return np.maximum(hidden, 0)


@pytest.mark.slow
def test_the_tail_computes_what_the_network_computes_behind_the_cut():
    net = network()
    x = np.random.default_rng(1).integers(-128, 128, (5, 7, FRAMES, BINS))
    x = jnp.asarray(x, jnp.int8)
    cut, behind = keyword.cut(net, 2, 2), keyword.cut(net, 3, 3)
    expected = steps_of(behind, x)
    found = hidden_of(cut, jnp.asarray(steps_of(cut, x), jnp.float32))
    # The network rounds twice on the way, and ends at 255 steps; the tail does not.
    difference = np.abs(np.minimum(found, 255 * behind.scale) - expected)
    assert np.mean(difference) < 0.5 * behind.scale
    assert np.max(difference) < 3 * behind.scale
    assert np.std(expected) > 10 * behind.scale
    # The kernels are the integers of the file.
    names = [name for name in net.params if "conv" in name]
    np.testing.assert_array_equal(
        cut.params["pointwise_0"]["kernel"].qvalue,
        np.asarray(net.params[names[4]].qvalue)[:, 0, 0].T,
    )


def test_a_cut_is_where_there_are_blocks():
    for first, last in ((0, 1), (2, 1), (1, BLOCKS + 1)):
        with pytest.raises(ValueError, match="among the 3 blocks"):
            keyword.cut(network(), first, last)
    with pytest.raises(ValueError, match="a depthwise convolution and a product"):
        keyword.cut(network(split=True), 1, 1)


@pytest.mark.slow
def test_a_published_network_is_cut_where_it_computes_the_same():
    pytest.importorskip("pymicro_wakeword", reason="needs fgrad[keywords]")
    net = int8_network.load(keyword.published("alexa"))
    t = np.arange(16_000) / 16_000
    sounds = [np.sin(2 * np.pi * (200 + 300 * i) * t * (1 + t)) for i in range(4)]
    samples = np.rint(8000 * np.stack(sounds)).astype(np.int16)
    cut, behind = keyword.cut(net, 2, 2), keyword.cut(net, 3, 3)
    features = cut(samples)
    assert features.shape == (4, 32, 64)
    difference = np.abs(hidden_of(cut, features) - behind(samples)) / behind.scale
    assert np.mean(difference) < 0.5  # of a step: the file rounds in between
    with pytest.raises(FileNotFoundError, match="no network 'computer'; it has alexa"):
        keyword.published("computer")


# --------------------------------------------------------------------------- the tasks


def made_up(seed=0):
    """Features that tell their labels, in the splits of the words."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(20, CHANNELS))

    def split(count):
        labels = np.repeat(np.arange(20), count)
        noise = rng.normal(size=(len(labels), 7, CHANNELS))
        images = np.maximum(0, 2 * centres[labels][:, None] + 0.5 * noise)
        return Split(images.astype(np.float32), labels.astype(np.int32))

    return {"train": split(8), "validation": split(5), "test": split(6)}


def rows(split):
    return {tuple(row) for row in np.asarray(split.images).reshape(len(split[0]), -1)}


def test_words_are_learned_from_some_voices_and_judged_by_others():
    data = made_up()
    for tuning, source, count in ((False, "test", 60), (True, "validation", 50)):
        task = keyword_table.words_task(data, 3, seed=0, tuning=tuning)
        assert np.bincount(task.support.labels).tolist() == [3] * 10
        assert len(task.query.labels) == count
        assert sorted(set(np.asarray(task.query.labels))) == list(range(10))
        half = data["train"].images[80 * tuning : 80 * (tuning + 1)]
        assert rows(task.support) <= rows(Split(half, ()))
        assert rows(task.query) <= rows(data[source])
    other = keyword_table.words_task(data, 3, seed=1, tuning=True)
    assert rows(other.support) != rows(task.support)


def test_voices_are_learned_from_some_recordings_and_judged_by_the_others():
    data = made_up()
    data["test"] = data["test"]._replace(labels=data["test"].labels + 17)
    task = keyword_table.voices_task(data, 4, seed=0, tuning=False)
    assert np.bincount(task.support.labels).tolist() == [4] * 20
    assert np.bincount(task.query.labels).tolist() == [2] * 20
    assert rows(task.support) | rows(task.query) == rows(data["test"])


@pytest.mark.slow
def test_a_smoke_run_fills_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(keyword, "published", lambda name: name)
    monkeypatch.setattr(int8_network, "load", lambda path: network())
    monkeypatch.setattr(keyword_table, "features", lambda *_: made_up())
    config = config_file.get_config("smoke")
    config.shots, config.run = 5, ("backprop_head", "adapt_8w8a")
    for name in config.run:
        config.methods[name].steps = 150
    results = keyword_table.run(config, str(tmp_path))
    assert json.loads((tmp_path / "results.json").read_text()) == results
    found = results["words"]["methods"]
    assert results["words"]["test_examples"] == 60
    assert list(found) == ["backprop_head", "adapt_8w8a"]
    assert all(one["accuracy"][0] > 0.5 for one in found.values())  # chance is .1
    assert all(len(one["validation"]) == 1 for one in found.values())
    table = (tmp_path / "table.md").read_text()
    assert "of one seed" in table
    assert "| adapt_8w8a |" in table
    assert main._DRIVERS[config.driver] is keyword_table.run


@pytest.mark.slow
def test_8w8a_begins_with_the_integers_of_the_file():
    cut = keyword.cut(network(), 2, 2)
    config = config_file.get_config("smoke")
    method = keyword_table._Method(config, config.methods["adapt_8w8a"], cut, None)
    variables = method._started(made_up()["train"].images[:20])
    kernel = variables["params"]["pointwise_0"]["kernel"]
    expected = cut.params["pointwise_0"]["kernel"]
    np.testing.assert_array_equal(kernel.qvalue, expected.qvalue)
    np.testing.assert_array_equal(kernel.scale, expected.scale)
    assert variables["params"][keyword.HEAD]["kernel"].qvalue.dtype == np.int8


def test_the_evaluations_of_all_methods_are_equal():
    config = config_file.get_config()
    costs = {name: method.passes for name, method in config.methods.items()}
    assert set(costs.values()) == {900}
    assert config.methods["adapt_fp32"].steps == 720
    assert len(config.seeds) == 5
    with pytest.raises(ValueError, match="must be one of"):
        config_file.get_config("sentences")


def test_settings_are_checked_before_any_work(tmp_path):
    for field, value, message in (
        ("tasks", ("songs",), "no task 'songs'"),
        ("run", ("forward",), "no method 'forward'"),
        ("seeds", (), "seeds must have at least one"),
        ("shots", 0, "shots must be at least 1"),
    ):
        config = config_file.get_config("smoke")
        with config.ignore_type():
            config[field] = value
        with pytest.raises(UsageError, match=message):
            keyword_table.run(config, str(tmp_path))


def test_a_missing_package_is_an_error_of_use(tmp_path, monkeypatch):
    monkeypatch.setattr(keyword, "_PACKAGE", "no_such_package")
    with pytest.raises(UsageError, match="pip install pymicro-wakeword"):
        keyword_table.run(config_file.get_config("smoke"), str(tmp_path))
