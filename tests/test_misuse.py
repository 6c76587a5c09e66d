"""Values that an option cannot have: the error names the option, the value, a remedy.

`OPTIONS` lists the options of all public functions, each with what it takes. Every one
is given every one of `VALUES`. What it does not take must be refused by this library
itself, by a TypeError or ValueError that names the option, and not by whatever the
value meets first. FGRAD_FUZZ=1 tries values that are made at random as well.
"""

import os
import pathlib
import re
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fgrad
from fgrad import (
    activity,
    analysis,
    enhancements,
    estimators,
    fixed_point,
    integer,
    layers,
)
from fgrad.activity import Site, SyntheticGradient
from fgrad.perturbations import low_rank, normal

KEY = jax.random.key(0)
W = {"w": jnp.array([1.0, -2.0])}
X = jnp.ones((1, 2))
NAN, INF = float("nan"), float("inf")


def loss_fn(params):
    return jnp.sum(jnp.asarray(params["w"]) ** 2)


def step(tx, params=W, value_fn=loss_fn, **extra):
    """One update, by JAX's abstract evaluation where nothing but types is needed."""
    state = tx.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    return tx.update(zeros, state, params, value_fn=value_fn, **extra)


# ------------------------------------------------------- every option, every value

VALUES: dict[str, Any] = {
    "a string": "x",
    "None": None,
    "infinity": INF,
    "NaN": NAN,
    "-1.5": -1.5,
    "0": 0,
    "0.5": 0.5,
    "3": 3,
    "3.0": 3.0,
    "18": 18,
    "np.int64(3)": np.int64(3),
    "np.float32(0.5)": np.float32(0.5),
    "an array of one": jnp.float32(0.5),
    "an array of two": jnp.ones(2),
    "True": True,
    "a list": [1],
    "an empty list": [],
    "a tuple": (8, 8),
    "a dict": {"a": 1},
    "complex": 1j,
    "an int of 400 digits": 10**400,
    "an array of text": np.array("x"),
    "bytes": b"x",
    "a type": int,
    "a function of nothing": lambda: 1.0,
    "an object": object(),
}

REAL = {"0.5", "3", "3.0", "18", "np.int64(3)", "np.float32(0.5)", "an array of one"}
WITH_ZERO = REAL | {"0"}
SHARE = {"0.5", "np.float32(0.5)", "an array of one"}
COUNT = {"3", "18", "np.int64(3)"}
SMALL = {"3", "np.int64(3)"}


class Option(NamedTuple):
    """An option: how it is given, and which of `VALUES` it takes."""

    call: Callable[[Any], Any]
    takes: set[str]
    # What messages call it, if not by the name of the option.
    words: str = ""


def traced(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call that is traced alone: nothing is compiled."""
    return jax.eval_shape(lambda: function(*args, **kwargs))


def with_(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A maker of options' calls: ``with_(f, x)("name")`` gives ``f(x, name=value)``."""
    return lambda name: lambda value: function(*args, **(kwargs | {name: value}))


link = with_(fgrad.fixed_point_forward_grad, KEY)
rate = with_(fgrad.qzo_ff, 0.1, KEY)
gradient = with_(
    lambda **options: traced(estimators.forward_gradient, loss_fn, W, KEY, **options)
)
quantized = with_(fgrad.quantize, {"w": jnp.ones((2, 3))})
inner = fgrad.qzo_ff(0.1, KEY)
sparse = with_(enhancements.sparse_update, inner, density=0.5)
site = with_(Site, "w")
program = integer.convert(lambda w, x: x @ w, jnp.eye(2), X)
converted = with_(integer.convert, lambda w, x: x @ w, jnp.eye(2), X)
trained = with_(integer.train_step, program, KEY, learning_rate=0.01, epsilon=0.01)
budget = with_(analysis.device_budget, lambda w, x: x @ w, jnp.eye(2), X)
DEFAULT = {"None"}

OPTIONS: dict[str, Option] = {
    "epsilon": Option(link("epsilon"), REAL),
    "num_perturbations": Option(link("num_perturbations"), COUNT),
    "vectorize": Option(link("vectorize"), SMALL),
    "perturbation": Option(link("perturbation"), DEFAULT),
    "low_bit": Option(link("low_bit"), DEFAULT),
    "estimator": Option(link("estimator"), DEFAULT),
    "on_nonfinite": Option(link("on_nonfinite"), set()),
    "guide": Option(link("guide"), DEFAULT),
    "has_aux": Option(link("has_aux"), {"True"}),
    "key": Option(lambda v: fgrad.fixed_point_forward_grad(v), set()),
    "mask": Option(lambda v: link("mask")(v).init(W), DEFAULT | {"True"}),
    "learning_rate of qzo_ff": Option(lambda v: fgrad.qzo_ff(v, KEY), REAL),
    "learning_rate without low_bit": Option(
        lambda v: fgrad.qzo_ff(v, KEY, low_bit=False), REAL
    ),
    "low_bit of qzo_ff": Option(rate("low_bit"), DEFAULT | {"True"}),
    "key of qzo_ff": Option(lambda v: fgrad.qzo_ff(0.1, v), set()),
    "stochastic_below": Option(
        with_(fgrad.quantized_update)("stochastic_below"), SMALL | {"0"}
    ),
    "inner of on_values": Option(fgrad.on_values, set()),
    "epsilon of dual_forward": Option(
        lambda v: traced(fgrad.dual_forward, loss_fn, W, KEY, v), REAL
    ),
    "perturbation of dual_forward": Option(
        lambda v: traced(fgrad.dual_forward, loss_fn, W, KEY, 0.1, v), DEFAULT
    ),
    "key of dual_forward": Option(
        lambda v: traced(fgrad.dual_forward, loss_fn, W, v, 0.1), set()
    ),
    "value_fn of dual_forward": Option(
        lambda v: traced(fgrad.dual_forward, v, W, KEY, 0.1), set()
    ),
    "sign of perturb": Option(
        lambda v: traced(fgrad.evaluation.perturb, W, KEY, 0.1, normal(), sign=v), {"0"}
    ),
    "epsilon of forward_gradient": Option(gradient("epsilon"), REAL),
    "num_perturbations of forward_gradient": Option(
        gradient("num_perturbations"), COUNT
    ),
    "vectorize of forward_gradient": Option(gradient("vectorize"), COUNT),
    "step of forward_gradient": Option(gradient("step"), COUNT | {"0", "3.0"}),
    "low_bit of forward_gradient": Option(gradient("low_bit"), DEFAULT),
    "estimator of forward_gradient": Option(gradient("estimator"), set()),
    "on_nonfinite of forward_gradient": Option(gradient("on_nonfinite"), set()),
    "losses": Option(
        lambda v: traced(fgrad.gradient_from_losses, W, KEY, 0, v, v),
        {"an array of two", "a list", "a tuple"},
    ),
    "relative_epsilon": Option(fgrad.relative_epsilon, REAL),
    "floor": Option(with_(fgrad.relative_epsilon, 0.1)("floor"), REAL),
    "step_epsilon": Option(fgrad.step_epsilon, REAL),
    "learning_rate": Option(fgrad.on_grid, REAL),
    "probe": Option(with_(fgrad.on_grid, 0.1)("probe"), DEFAULT | {"a tuple"}),
    "below": Option(with_(fgrad.on_grid, 0.1)("below"), SMALL),
    "bits": Option(quantized("bits"), SMALL),
    "calibration": Option(quantized("calibration"), set()),
    "headroom": Option(quantized("headroom"), REAL),
    "zero_bound": Option(quantized("zero_bound"), REAL),
    "channel_axis": Option(quantized("channel_axis"), DEFAULT | {"0"}),
    "where": Option(quantized("where"), DEFAULT),
    "percentile": Option(fixed_point.percentile, REAL),
    "num_candidates": Option(fixed_point.mse_optimal, COUNT),
    "scale": Option(
        lambda v: fgrad.QTensor(jnp.zeros(3, jnp.int8), v),
        # Its numbers are looked at by check_values, when a run begins.
        {"0.5", "3", "3.0", "18", "np.float32(0.5)", "an array of one"}
        # None stands for an axis that jax.vmap does not map over.
        | {"0", "-1.5", "NaN", "infinity", "an object", "None"},
    ),
    "bits of QTensor": Option(
        lambda v: fgrad.QTensor(jnp.zeros(3, jnp.int8), jnp.float32(1), v),
        SMALL | {"0"},
    ),
    "bits of normal": Option(normal, SMALL),
    "z_max": Option(
        lambda v: normal(8, v), DEFAULT | {"3", "3.0", "18", "np.int64(3)"}
    ),
    "rank": Option(low_rank, COUNT),
    "alpha": Option(enhancements.momentum_guided_sampling, SHARE | {"0"}),
    "beta": Option(lambda v: enhancements.momentum_guided_sampling(0.5, v), SHARE),
    "rho": Option(lambda v: enhancements.sharpness_aware(inner, KEY, rho=v), REAL),
    "inner": Option(lambda v: enhancements.sharpness_aware(v, KEY, rho=0.1), set()),
    "per": Option(with_(enhancements.kernel_normalization)("per"), set()),
    "floor of kernel_normalization": Option(
        with_(enhancements.kernel_normalization)("floor"), REAL
    ),
    "below of error_feedback": Option(
        with_(enhancements.error_feedback)("below"), SMALL
    ),
    "density": Option(sparse("density"), SHARE),
    "criterion": Option(sparse("criterion"), set()),
    "threshold": Option(
        with_(enhancements.sparse_update, inner, density=0.5, criterion="threshold")(
            "threshold"
        ),
        WITH_ZERO,
    ),
    "reselect_every": Option(sparse("reselect_every"), DEFAULT | COUNT),
    "sites": Option(lambda v: activity.activity_forward_grad(KEY, v), set(), "site"),
    "sites of leaves_of": Option(activity.leaves_of, {"an empty list"}, "site"),
    "value_fn of activity.explain": Option(
        lambda v: activity.explain(v, W, ["w"]), set()
    ),
    "value_fn of explain": Option(lambda v: fgrad.evaluation.explain(v, W), set()),
    "calibration of a layer": Option(
        lambda v: layers.Dense(2, bits=(16, 8), calibration=v), set()
    ),
    "bits of a layer": Option(lambda v: layers.Dense(2, bits=v), DEFAULT | {"a tuple"}),
    "activation_scale of a layer": Option(
        lambda v: layers.Dense(2, activation_scale=v), set()
    ),
    "model of calibrate": Option(lambda v: layers.calibrate(v, {}, X), set()),
    "step of memory_report": Option(lambda v: analysis.memory_report(v, X), set()),
    "num_perturbations of activities": Option(
        with_(activity.activity_forward_grad, KEY, ["w"])("num_perturbations"), COUNT
    ),
    "vectorize of activities": Option(
        with_(activity.activity_forward_grad, KEY, ["w"])("vectorize"), COUNT
    ),
    "others of activities": Option(
        with_(activity.activity_forward_grad, KEY, ["w"])("others"), DEFAULT, "inner"
    ),
    "name of a site": Option(Site, {"a string"}, "site"),
    "epsilon of a site": Option(site("epsilon"), REAL),
    "num_perturbations of a site": Option(site("num_perturbations"), COUNT | DEFAULT),
    "exact of a site": Option(site("exact"), {"True"}),
    "loss of a site": Option(site("loss"), DEFAULT | {"a string"}),
    "synthetic of a site": Option(site("synthetic"), DEFAULT),
    "site of SyntheticGradient": Option(
        SyntheticGradient, {"a string"}, "synthetic gradient needs"
    ),
    "memory": Option(lambda v: SyntheticGradient("w", v), WITH_ZERO),
    "correction": Option(lambda v: SyntheticGradient("w", 3, v), SHARE | {"0"}),
    "bits of convert": Option(converted("bits"), {"a tuple"}),
    "headroom of convert": Option(converted("headroom"), REAL - SHARE),
    "fn of convert": Option(lambda v: integer.convert(v, jnp.eye(2), X), set()),
    "program of train_step": Option(
        lambda v: integer.train_step(v, KEY, learning_rate=0.1, epsilon=0.1), set()
    ),
    "learning_rate of train_step": Option(trained("learning_rate"), REAL),
    "epsilon of train_step": Option(trained("epsilon"), REAL),
    "num_perturbations of train_step": Option(trained("num_perturbations"), COUNT),
    "decay_steps of train_step": Option(trained("decay_steps"), DEFAULT | COUNT),
    "estimator of train_step": Option(trained("estimator"), set()),
    "where of train_step": Option(trained("where"), DEFAULT),
    "model of to_c": Option(lambda v: integer.to_c(v, "unused"), set()),
    "model of export": Option(integer.export, set()),
    "num_estimates": Option(
        lambda v: analysis.gradient_quality(lambda k: W, W, KEY, num_estimates=v),
        COUNT,
    ),
    "chunk": Option(
        lambda v: analysis.loss_landscape(
            loss_fn, W, analysis.Directions(W, W), first=[0.0], chunk=v
        ),
        COUNT,
    ),
    "first": Option(
        lambda v: analysis.loss_landscape(
            loss_fn, W, analysis.Directions(W, W), first=v
        ),
        {"a list", "a tuple", "an array of two"},
    ),
    "directions": Option(lambda v: analysis.loss_landscape(loss_fn, W, v), set()),
    "key of random_directions": Option(
        lambda v: analysis.random_directions(v, {"w": jnp.eye(2)}), set()
    ),
    "method": Option(budget("method"), set()),
    "bits of device_budget": Option(budget("bits"), {"a tuple"}),
    "gradient_bits": Option(budget("gradient_bits"), DEFAULT | COUNT),
    "density of device_budget": Option(budget("density"), SHARE),
    "slots": Option(budget("slots"), COUNT | {"0"}),
}

FGRAD = str(pathlib.Path(fgrad.__file__).parent)


def refusal(call: Callable[[Any], Any], value: Any) -> str | None:
    """What a call says of a value; None if it takes it.

    It fails for an error of another type, and for one that was raised elsewhere.
    """
    try:
        call(value)
    except (TypeError, ValueError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        said = str(error)
    else:
        return None
    assert where.startswith(FGRAD), f"raised in {where}: {said}"
    return said


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_refuses_what_it_does_not_take(name):
    option = OPTIONS[name]
    wanted = option.words or name.split(" of ")[0].split(" without ")[0]
    for kind, value in VALUES.items():
        said = refusal(option.call, value)
        if kind in option.takes:
            assert said is None, f"{kind}: {said}"
        else:
            assert said is not None, f"{kind} is taken"
            assert wanted in said, f"{kind}: {said}"
            assert shown(value, said), f"{kind} is not shown: {said}"


def shown(value: Any, said: str) -> bool:
    """Whether a message says what came: the value, its dtype or its shape."""
    text = repr(value)
    named = getattr(value, "__name__", text)
    looks = [text, text[:40], str(value), named, str(np.shape(value))]
    return any(look in said for look in looks) or bool(
        re.search(r"got \w+|is empty", said)
    )


@pytest.mark.skipif(
    not os.environ.get("FGRAD_FUZZ"), reason="the long form: set FGRAD_FUZZ=1"
)
@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_values_made_at_random_are_taken_or_refused_by_name(name):
    rng = np.random.default_rng(len(name))
    option = OPTIONS[name]
    wanted = option.words or name.split(" of ")[0].split(" without ")[0]
    for _ in range(60):
        value = made(rng, 2)
        said = refusal(option.call, value)
        assert said is None or wanted in said, f"{value!r}: {said}"


def made(rng: np.random.Generator, depth: int) -> Any:
    """A value of a random kind."""
    kinds: list[Callable[[], Any]] = [
        lambda: int(rng.integers(-3, 30)),
        lambda: float(rng.normal() * 10.0 ** rng.integers(-5, 5)),
        lambda: rng.normal(size=rng.integers(0, 3, rng.integers(0, 3))),
        lambda: jnp.asarray(rng.integers(-3, 9, rng.integers(0, 3, 1))),
        lambda: np.dtype(rng.choice(["int8", "uint16", "float16"])).type(3),
        lambda: "".join(rng.choice(list("ab/ :0é"), 3)),
        lambda: bool(rng.integers(2)),
        lambda: complex(1, 2),
        lambda: lambda *args: args,
        lambda: W,
        lambda: fgrad.quantize(W),
        lambda: optax.sgd(0.1),
    ]
    if depth:
        kinds += [
            lambda: [made(rng, depth - 1) for _ in range(rng.integers(4))],
            lambda: tuple(made(rng, depth - 1) for _ in range(rng.integers(4))),
            lambda: {"w": made(rng, depth - 1)},
        ]
    return kinds[rng.integers(len(kinds))]()


# ---------------------------------------------------------- what is not an option


class Module:
    """A module with a function in it, as a pytree, such as one of Equinox."""

    def __init__(self, w: Any, activation: Any) -> None:
        self.w, self.activation = w, activation


jax.tree_util.register_pytree_with_keys(
    Module,
    lambda m: (
        (
            (jax.tree_util.GetAttrKey("w"), m.w),
            (jax.tree_util.GetAttrKey("activation"), m.activation),
        ),
        None,
    ),
    lambda _, children: Module(*children),
)

ONES = jnp.ones(2)
LEAVES = {
    "a module with a function": (Module(ONES, jnp.tanh), "'activation'.*a function"),
    "a string": ({"w": ONES, "name": "net"}, "'name'.*a str, 'net'.*eqx.partition"),
    "an object": ({"w": ONES, "o": object()}, "'o' of params is a object"),
    "an array of objects": ({"w": np.array([object()])}, "an array of dtype object"),
    "an array of text": ({"w": np.array(["a"])}, "an array of dtype <U1"),
    "a date": ({"w": np.array(["2020"], "datetime64[Y]")}, "dtype datetime64"),
    "a shape": (
        {"w": jax.ShapeDtypeStruct((2,), jnp.float32)},
        "a ShapeDtypeStruct",
    ),
    "complex": ({"w": ONES * 1j}, "complex64.*real and its imaginary part"),
    "float8": ({"w": ONES.astype(jnp.float8_e4m3fn)}, "float8_e4m3fn.*bfloat16"),
    "float4": ({"w": ONES.astype(jnp.float4_e2m1fn)}, "float4_e2m1fn.*bfloat16"),
    "int32": ({"w": jnp.ones(2, jnp.int32)}, r"fgrad.QTensor\(qvalue, scale"),
    "bool": ({"w": jnp.ones(2, bool)}, "holds no weights"),
    "a key": ({"w": ONES, "k": KEY}, "holds no weights: exclude it with mask="),
}
LINKS = {
    "fixed_point_forward_grad": lambda p: fgrad.fixed_point_forward_grad(KEY).init(p),
    "qzo_ff": lambda p: fgrad.qzo_ff(0.1, KEY).init(p),
    "dual_forward": lambda p: fgrad.dual_forward(lambda p: 1.0, p, KEY, 0.1),
    "sharpness_aware": lambda p: enhancements.sharpness_aware(inner, KEY, rho=0.1).init(
        p
    ),
    "sparse_update": lambda p: enhancements.sparse_update(inner, density=0.5).init(p),
}


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("kind", LEAVES)
def test_leaves_that_cannot_be_perturbed(kind, name):
    params, words = LEAVES[kind]
    said = refusal(LINKS[name], params)
    assert said is not None
    assert re.search(words, said), said


def test_other_links_refuse_what_is_no_array():
    params, words = LEAVES["a module with a function"]
    for tx in (
        fgrad.quantized_update(),
        enhancements.kernel_normalization(),
        enhancements.error_feedback(),
        fgrad.activity_forward_grad(KEY, ["w"]),
    ):
        assert re.search(words, refusal(tx.init, params) or "")
    said = refusal(lambda p: integer.convert(lambda p, x: x, p, X), params)
    assert re.search(words, said or "")


def with_names(*names: str) -> Callable[..., Any]:
    """A loss whose arguments have these names."""
    scope: dict[str, Any] = {"loss_fn": loss_fn}
    exec(f"def value_fn(p, {', '.join(names)}): return loss_fn(p)", scope)
    return scope["value_fn"]


@pytest.mark.parametrize(
    ("value_fn", "words"),
    [
        (3, "value_fn must be a function of the parameters, got 3"),
        ("loss", "value_fn must be a function of the parameters, got 'loss'"),
        (lambda: 1.0, r"value_fn is called as value_fn\(params\), which <lambda> does"),
        (lambda *, p: 1.0, r"value_fn is called as value_fn\(params\)"),
        (lambda p: None, "got None: it has no return"),
        (lambda p: "x", "must return a scalar loss, got 'x'"),
        (lambda p: p["w"], r"must return a scalar loss, got shape \(2,\).*jnp.mean"),
        (lambda p: {"loss": 1.0}, "got a dict.*has_aux=True"),
        (lambda p: 1j * loss_fn(p), "a real loss, got dtype complex64; make it a"),
        (lambda p: loss_fn(p) > 0, r"got dtype bool; .*astype\(jnp.float32\)"),
        (lambda p: jnp.uint32(3), "got dtype uint32"),
        (lambda p: loss_fn(p).astype(jnp.float8_e5m2), "got dtype float8_e5m2"),
        (lambda p: KEY, "got dtype key<fry>"),
        (with_names("state"), "names an argument 'state'.*such as 'model_state'"),
        (with_names("x", "params"), "names an argument 'params'"),
        (with_names("updates"), "names an argument 'updates'"),
        (with_names("value_fn"), "names an argument 'value_fn'"),
        (with_names("x"), r"value_fn needs x.*x=\.\.\."),
    ],
)
def test_losses_that_are_none(value_fn, words):
    for tx in (fgrad.fixed_point_forward_grad(KEY), fgrad.qzo_ff(0.1, KEY)):
        said = refusal(lambda f, tx=tx: step(tx, value_fn=f), value_fn)
        assert re.search(words, said or ""), said


@pytest.mark.parametrize("name", ["state", "params", "updates"])
def test_an_argument_of_update_given_twice(name):
    for tx in (fgrad.fixed_point_forward_grad(KEY), fgrad.qzo_ff(0.1, KEY)):
        call = lambda v, tx=tx: tx.update(  # noqa: E731
            W, tx.init(W), W, value_fn=loss_fn, **{name: v}
        )
        said = refusal(call, 3)
        assert f"tx.update got two arguments '{name}'" in (said or "")


BAD_SCHEDULES = {
    "text": (lambda count: "x", "must be a number, got 'x' of type str"),
    "nothing": (lambda count: None, "must be a number, got None"),
    "an array": (lambda count: jnp.ones(3), "must be a number"),
    "no step": (lambda: 1.0, r"is called as \w+\(step\), which <lambda> does not"),
    "NaN": (lambda count: NAN, "a schedule that gives nan at step 0"),
    "NaN later": (
        lambda count: jnp.where(count > 1000, jnp.nan, 0.1),
        "a schedule that gives nan at step",
    ),
    "negative": (lambda count: -0.1, "gives -0.1.* at step 0; it must be finite and"),
}


@pytest.mark.parametrize("kind", BAD_SCHEDULES)
def test_schedules_that_are_none(kind):
    schedule, words = BAD_SCHEDULES[kind]
    for name, call in {
        "epsilon": link("epsilon"),
        "learning_rate": lambda v: fgrad.qzo_ff(v, KEY),
        "learning_rate ": lambda v: fgrad.qzo_ff(v, KEY, low_bit=False),
        "relative_epsilon": fgrad.relative_epsilon,
        "step_epsilon": fgrad.step_epsilon,
        "learning_rate  ": fgrad.on_grid,
        "rho": lambda v: enhancements.sharpness_aware(inner, KEY, rho=v),
    }.items():
        said = refusal(call, schedule) or ""
        assert name.strip() in said, said
        assert re.search(words, said), said


def test_schedules_that_end_at_zero_and_those_of_traced_numbers_are_taken():
    link("epsilon")(optax.linear_schedule(0.1, 0.0, 10))

    @jax.jit
    def inside(rate):
        schedule = lambda count: rate / (1 + count)  # noqa: E731
        return step(fgrad.qzo_ff(schedule, KEY, epsilon=schedule))[0]

    assert jnp.all(jnp.isfinite(inside(0.1)["w"]))


@pytest.mark.parametrize(
    ("estimator", "words"),
    [
        (
            lambda plus, minus, epsilon: jnp.sum(plus),
            r"shape \(\).*one real coefficient",
        ),
        (lambda plus, minus, epsilon: (plus, minus), r"returned \(.*for losses of"),
        (lambda plus, minus, epsilon: None, "returned None for losses of shape"),
        (lambda plus, minus, epsilon: plus * 1j, "dtype complex64"),
        (lambda plus, minus, epsilon: plus > minus, "dtype bool"),
        (lambda plus, minus: plus, "estimator is called as estimator"),
    ],
)
def test_estimators_that_are_none(estimator, words):
    said = refusal(lambda e: step(link("estimator")(e)), estimator)
    assert re.search(words, said or ""), said


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        (lambda x, axes, bits: "x", "must return the largest magnitude.*got 'x'"),
        (lambda x, axes, bits: jnp.ones(7), r"floats of shape \(1, 1\)"),
        (lambda x, axes, bits: jnp.float32(-1), "must return magnitudes, got -1"),
        (lambda x, axes, bits: jnp.float32(NAN), "must return magnitudes, got nan"),
        (lambda x: x, r"calibration is called as calibration\(x, axes, bits\)"),
        (fixed_point.percentile, r"pass fgrad.fixed_point.percentile\(99.9\)"),
    ],
)
def test_calibrations_that_are_none(calibration, words):
    said = refusal(quantized("calibration"), calibration)
    assert re.search(words, said or ""), said


def test_points_of_other_networks_make_no_plane():
    other = {"v": jnp.ones(2)}
    for call in (
        lambda v: analysis.trajectory_directions([W, v], W),
        lambda v: analysis.plane_through(W, v, W),
    ):
        assert "structure and the shapes of the center" in (refusal(call, other) or "")
    said = refusal(lambda v: analysis.trajectory_directions(v, W), [])
    assert "trajectory is empty" in (said or "")
    said = refusal(lambda v: analysis.coordinates([W], W, v), 3)
    assert "directions must be a fgrad.analysis.Directions" in (said or "")


def test_where_answers_with_bools():
    for where in (lambda path, leaf: None, lambda path, leaf: "yes"):
        assert "where must return True or False" in (
            refusal(quantized("where"), where) or ""
        )
    assert fgrad.quantize(W, where=lambda path, leaf: np.bool_(False)) is not None


def test_masks_that_are_none():
    for mask, words in [
        (lambda params: None, "returned None: it has no return"),
        ({"w": jnp.array(True)}, "mask must hold Python bools"),
        ({"v": True}, "mask must be a bool, or a pytree of bools"),
    ]:
        assert words in (refusal(lambda m: link("mask")(m).init(W), mask) or "")


def test_a_gradient_from_elsewhere_beside_a_grid():
    q = fgrad.quantize(W)
    tx = fgrad.quantized_update()
    said = refusal(lambda u: tx.update(u, tx.init(q), q), W)
    assert "the update of a QTensor is a" in (said or "")


def test_a_number_of_perturbations_of_numpy_gives_the_same_bits():
    for count in (np.int64(3), np.int32(3), np.uint8(3)):
        policy = fgrad.leaves.Policy(num_perturbations=count)
        assert policy == fgrad.leaves.Policy(num_perturbations=3)
        assert type(policy.num_perturbations) is int
    update, _ = step(fgrad.fixed_point_forward_grad(KEY, num_perturbations=count))
    wanted, _ = step(fgrad.fixed_point_forward_grad(KEY))
    assert jnp.array_equal(update["w"], wanted["w"])
