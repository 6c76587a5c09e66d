"""Flax layers that run float or fixed-point kernels, with the same parameters.

Each layer is Flax's own, with the product exchanged: names and shapes of parameters
are Flax's, so its checkpoints load. The kernel's type and ``bits`` decide:

=========  ===============  ========================================================
kernel     bits             product
=========  ===============  ========================================================
float      None             float, as in Flax
float      (w, a)           float on the grid, straight-through gradient (AQT)
`QTensor`  (w, a)           int8 products, int32 sums (`fgrad.fixed_point.products`)
`QTensor`  None, (w, None)  float product with the dequantized kernel
=========  ===============  ========================================================

In the place of ``bits``, a layer takes a configuration of AQT as ``aqt``, such as
``aqt.jax.v2.config.config_v4()``. Its numerics and calibration then quantize
activations and float kernels; `fgrad.fixed_point.aqt_products` says whose product runs.

Scales of activations are "static", calibrated once by `calibrate` and kept in the
variable collection "activation_scales", or "dynamic", taken from each input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from flax.linen import dtypes
from jax import lax

from fgrad import _checks, fixed_point
from fgrad.fixed_point import QTensor, aqt_products, is_qtensor, products
from fgrad.fixed_point.calibration import check_calibration

SCALES = "activation_scales"

_WIDEST = {"weights": 16, "activations": 8}

# (bits of weights, bits of activations); None for a float operand, or for both.
Bits = tuple[int | None, int | None] | None


def calibrate(
    model: nn.Module,
    variables: Mapping[str, Any],
    *args: Any,
    headroom: float = 1.0,
    **kwargs: Any,
) -> dict[str, Any]:
    """Runs data through a model once and stores the scales of its activations.

    The run is in float, with dequantized kernels.

    Args:
      model: a model made of this module's layers, with static activation scales.
      variables: its variables; kernels may be float or `QTensor`. Scales that are
        already there are replaced.
      *args: the data, and whatever else ``model.apply`` takes.
      headroom: multiplies the scales, as room for activations to grow while the
        weights are trained.
      **kwargs: passed to ``model.apply``.

    Returns:
      The variables with the collection "activation_scales" added.

    Raises:
      ValueError: if ``headroom`` is not positive, the model holds no layer with
        static scales, or an activation is not finite.

    Example:
      >>> model = Dense(2, bits=(16, 8))
      >>> x = jnp.array([[1.27, -0.5]])
      >>> params = nn.Dense(2).init(jax.random.key(0), x)["params"]
      >>> variables = calibrate(model, {"params": fixed_point.quantize(params)}, x)
      >>> jax.tree.leaves(variables["activation_scales"])
      [Array(0.01, dtype=float32)]
    """
    _checks.positive("headroom", headroom)
    if not (callable(getattr(model, "init", None)) and hasattr(model, "apply")):
        raise TypeError(
            "model must have init and apply, as a module of Flax linen has, got "
            f"{model!r:.60}; calibrate takes (model, variables, data)."
        )
    variables = {name: v for name, v in variables.items() if name != SCALES}
    empty = _uncalibrated(model, *args, **kwargs)
    if not empty:
        raise ValueError(
            "the model has no static activation scales to calibrate: give its layers "
            'bits=(w, a) and activation_scale="static".'
        )
    _, found = model.apply(
        {**variables, SCALES: empty}, *args, mutable=SCALES, **kwargs
    )

    def finish(path: tuple[Any, ...], scale: jax.Array) -> jax.Array:
        if fixed_point.is_concrete(scale) and not jnp.isfinite(scale):
            raise ValueError(
                f"the activations of {fixed_point.path_str(path)!r} hold NaN or "
                "infinity; check the data and the weights."
            )
        return jnp.where(scale > 0, scale * headroom, 1.0)

    scales = jax.tree_util.tree_map_with_path(finish, found[SCALES])
    return {**variables, SCALES: scales}


def _uncalibrated(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The collection of scales, all zero.

    `calibrate` starts from it, because a scan cannot add a collection on its way.
    """
    empty: dict[tuple[str, ...], np.float32] = {}

    def note(next_fn: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if isinstance(module, _Product) and module.static_activations:
            for operand in module.operands:
                empty[(*module.path, f"{operand}_scale")] = np.float32(0)
        return next_fn(*args, **kwargs)

    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    with nn.intercept_methods(note):
        jax.eval_shape(lambda: model.init(rngs, *args, **kwargs))
    collection: dict[str, Any] = traverse_util.unflatten_dict(empty)
    return collection


class _Quantized(nn.Module, kw_only=True):  # type: ignore[call-arg]  # Flax is untyped
    """The settings that all layers here share; each is given by its name.

    Attributes:
      bits: (bits of weights, bits of activations), or None; see `Dense`.
      activation_scale: "static" or "dynamic".
      calibration: how a scale is found, in `calibrate` or from each input.
      aqt: an AQT configuration, which takes the place of the three above, or None.
    """

    bits: Bits = None
    activation_scale: str = "static"
    calibration: fixed_point.Calibration = fixed_point.abs_max
    aqt: Any = None

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        if self.aqt is not None:
            aqt_products.check_config(self.aqt)
            if self.bits is not None:
                raise ValueError(
                    f"a layer takes bits={self.bits} or an AQT configuration, aqt=, "
                    "and this one has both."
                )
        kinds = ("static", "dynamic")
        _checks.choice("activation_scale", self.activation_scale, kinds)
        check_calibration(self.calibration)
        super().__post_init__()

    @property
    def settings(self) -> dict[str, Any]:
        """The settings, for a layer or a product inside this one."""
        return {
            "bits": self.bits,
            "activation_scale": self.activation_scale,
            "calibration": self.calibration,
            "aqt": self.aqt,
        }


class _Product(_Quantized):
    """A product whose operands are put on their grids first."""

    operands: ClassVar[tuple[str, ...]] = ("lhs",)  # the operands that are activations

    @property
    def activation_bits(self) -> int:
        """Bits of activations; 0 where they stay floats."""
        return (self.bits and self.bits[1]) or 0

    @property
    def static_activations(self) -> bool:
        """Whether the scales of activations are stored."""
        return bool(self.activation_bits) and self.activation_scale == "static"

    @property
    def rounding_key(self) -> jax.Array | None:
        """The key of AQT's rounding at random, which backward passes may have."""
        return self.make_rng("params") if self.has_rng("params") else None

    def _with_weights(
        self,
        lhs: jax.Array,
        rhs: jax.Array | QTensor,
        float_fn: Callable[[jax.Array, jax.Array], jax.Array],
        integer_fn: Callable[[QTensor, QTensor], jax.Array],
    ) -> jax.Array:
        """The product of an activation and a kernel, by the table of this module.

        Args:
          lhs: the activation.
          rhs: the kernel.
          float_fn: the product of floats.
          integer_fn: the product of integers.
        """
        weight_bits = self.bits and self.bits[0]
        if isinstance(rhs, QTensor) and weight_bits not in (None, rhs.bits):
            raise ValueError(
                f"the layer takes bits={self.bits} but its kernel has {rhs.bits} bits; "
                f"use fgrad.quantize(params, bits={weight_bits}) or change the layer."
            )
        scale = self._scale("lhs", lhs)
        if isinstance(rhs, QTensor):
            if scale is None:
                return float_fn(lhs, rhs.dequantize().astype(lhs.dtype))
            x = fixed_point.quantize_to_scale(lhs, scale, self.activation_bits)
            return integer_fn(x, rhs).astype(lhs.dtype)
        if weight_bits is not None:
            rhs_scale = fixed_point.calibrate_scale(rhs, weight_bits)
            rhs = fixed_point.fake_quantize(rhs, rhs_scale, weight_bits)
        return float_fn(self._fake_quantize(lhs, scale), rhs)

    def _fake_quantize(self, x: jax.Array, scale: jax.Array | None) -> jax.Array:
        if scale is None:
            return x
        return fixed_point.fake_quantize(x, scale, self.activation_bits)

    def _scale(self, name: str, x: jax.Array) -> jax.Array | None:
        """Scale of an activation; None where it stays a float."""
        if not self.activation_bits:
            return None
        if not self.static_activations:
            return self._calibrated(x)
        if self.is_initializing():
            return None
        name = f"{name}_scale"
        if self.is_mutable_collection(SCALES):
            stored = self.variable(SCALES, name, lambda: jnp.float32(0))
            # An input of zeros, such as the first hidden state, has no scale.
            found = jnp.where(jnp.any(x != 0), self._calibrated(x), 0)
            stored.value = jnp.maximum(stored.value, found)
            return None
        if not self.has_variable(SCALES, name):
            raise ValueError(
                f"layer {'/'.join(self.path)} has no static activation scale. Run "
                "variables = fgrad.layers.calibrate(model, variables, x) and pass "
                'its "activation_scales" on, or use activation_scale="dynamic".'
            )
        scale: jax.Array = self.get_variable(SCALES, name)
        return scale

    def _calibrated(self, x: jax.Array) -> jax.Array:
        return fixed_point.calibrate_scale(
            x, self.activation_bits, calibration=self.calibration
        )


class DotGeneral(_Product):
    """``lax.dot_general`` of an activation and a kernel, for ``dot_general_cls=``."""

    @nn.compact
    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array | QTensor,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
    ) -> jax.Array:
        """See ``jax.lax.dot_general``; ``rhs`` may be a `QTensor`."""
        if self.aqt is not None:
            return aqt_products.dot_general(
                self.aqt, lhs, rhs, dimension_numbers, key=self.rounding_key
            )
        return self._with_weights(
            lhs,
            rhs,
            lambda x, w: lax.dot_general(
                x, w, dimension_numbers, precision, preferred_element_type
            ),
            lambda x, w: products.dot_general(x, w, dimension_numbers),
        )


class ActivationDotGeneral(_Product):
    """``lax.dot_general`` of two activations, as attention has them."""

    operands: ClassVar[tuple[str, ...]] = ("lhs", "rhs")

    @nn.compact
    def __call__(
        self, lhs: jax.Array, rhs: jax.Array, dimension_numbers: Any, integer: bool
    ) -> jax.Array:
        """See ``jax.lax.dot_general``; ``integer`` asks for the int8 product."""
        if self.aqt is not None:
            return aqt_products.activation_dot_general(
                self.aqt, lhs, rhs, dimension_numbers, key=self.rounding_key
            )
        lhs_scale, rhs_scale = self._scale("lhs", lhs), self._scale("rhs", rhs)
        if integer and lhs_scale is not None and rhs_scale is not None:
            bits = self.activation_bits
            x = fixed_point.quantize_to_scale(lhs, lhs_scale, bits)
            y = fixed_point.quantize_to_scale(rhs, rhs_scale, bits)
            return products.dot_general(x, y, dimension_numbers).astype(lhs.dtype)
        return lax.dot_general(
            self._fake_quantize(lhs, lhs_scale),
            self._fake_quantize(rhs, rhs_scale),
            dimension_numbers,
        )


class ConvGeneralDilated(_Product):
    """``lax.conv_general_dilated``, for Flax's ``conv_general_dilated_cls=``."""

    @nn.compact
    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array | QTensor,
        window_strides: Any,
        padding: Any,
        lhs_dilation: Any = None,
        rhs_dilation: Any = None,
        dimension_numbers: Any = None,
        feature_group_count: int = 1,
        precision: Any = None,
    ) -> jax.Array:
        """See ``jax.lax.conv_general_dilated``; ``rhs`` may be a `QTensor`."""
        arguments = (
            window_strides,
            padding,
            lhs_dilation,
            rhs_dilation,
            dimension_numbers,
            feature_group_count,
        )
        if self.aqt is not None:
            return aqt_products.conv_general_dilated(self.aqt, lhs, rhs, *arguments)
        return self._with_weights(
            lhs,
            rhs,
            lambda x, w: products.float_conv_general_dilated(
                x, w, *arguments, precision=precision
            ),
            lambda x, w: products.conv_general_dilated(x, w, *arguments),
        )


def _promote_dtype(
    inputs: Any, kernel: Any, *rest: Any, dtype: Any = None, inexact: bool = True
) -> list[Any]:
    """Flax's ``promote_dtype``, but a `QTensor` kernel stays what it is."""
    if not is_qtensor(kernel):
        promoted = dtypes.promote_dtype(
            inputs, kernel, *rest, dtype=dtype, inexact=inexact
        )
        return list(promoted)
    inputs, *rest = dtypes.promote_dtype(inputs, *rest, dtype=dtype, inexact=inexact)
    return [inputs, kernel, *rest]


class Dense(_Quantized, nn.Dense):
    r"""``flax.linen.Dense`` with a float or fixed-point kernel.

    .. math:: y = x W + b

    Attributes:
      bits: (bits of weights, bits of activations), for example (16, 8); None for a
        float operand, or for both.
      activation_scale: "static" (see `calibrate`) or "dynamic".
      calibration: how the scale of the input is found; ``fixed_point.abs_max``.
      aqt: an AQT configuration in the place of these, as for all layers that follow.

    All other attributes are Flax's.

    Raises:
      ValueError: for impossible bits; if the kernel's bits are others; if a static
        scale is missing.

    Example:
      >>> layer = Dense(3, bits=(16, 8), activation_scale="dynamic")
      >>> x = jnp.ones((2, 4))
      >>> variables = layer.init(jax.random.key(0), x)
      >>> layer.apply(fixed_point.quantize(variables), x).shape
      (2, 3)
    """

    promote_dtype: Any = _promote_dtype

    def __post_init__(self) -> None:
        self.dot_general_cls = functools.partial(DotGeneral, **self.settings)
        super().__post_init__()


class DenseGeneral(_Quantized, nn.DenseGeneral):
    """``flax.linen.DenseGeneral`` with a float or fixed-point kernel.

    Attributes:
      bits: see `Dense`, as for all that follow.
      activation_scale: "static" or "dynamic".
      calibration: how the scale of the input is found.

    All other attributes are Flax's.

    Example:
      >>> layer = DenseGeneral((2, 3), bits=(8, 8), activation_scale="dynamic")
      >>> x = jnp.ones((5, 4))
      >>> variables = layer.init(jax.random.key(0), x)
      >>> layer.apply(fixed_point.quantize(variables, bits=8), x).shape
      (5, 2, 3)
    """

    promote_dtype: Any = _promote_dtype

    def __post_init__(self) -> None:
        self.dot_general_cls = functools.partial(DotGeneral, **self.settings)
        super().__post_init__()


class Conv(_Quantized, nn.Conv):
    """``flax.linen.Conv`` with a float or fixed-point kernel.

    Strided, dilated, grouped and depthwise (``feature_group_count``), in one, two or
    three dimensions.

    Attributes:
      bits: see `Dense`, as for all that follow.
      activation_scale: "static" or "dynamic".
      calibration: how the scale of the input is found.

    All other attributes are Flax's.

    Example:
      >>> layer = Conv(8, (3, 3), bits=(16, 8), activation_scale="dynamic")
      >>> x = jnp.ones((1, 6, 6, 4))
      >>> variables = layer.init(jax.random.key(0), x)
      >>> layer.apply(fixed_point.quantize(variables), x).shape
      (1, 6, 6, 8)
    """

    promote_dtype: Any = _promote_dtype

    def __post_init__(self) -> None:
        self.conv_general_dilated_cls = functools.partial(
            ConvGeneralDilated, **self.settings
        )
        super().__post_init__()


class Embed(_Quantized, nn.Embed):
    """``flax.linen.Embed`` with a float or fixed-point table.

    A look-up gathers integers and dequantizes what it gathered. ``attend`` is a
    product like that of `Dense`; it needs one scale per tensor or per row.

    Attributes:
      bits: see `Dense`, as for all that follow.
      activation_scale: "static" or "dynamic"; only ``attend`` has an activation.
      calibration: how the scale of the query is found.

    All other attributes are Flax's.

    Example:
      >>> layer = Embed(10, 4, bits=(8, 8))
      >>> tokens = jnp.array([1, 7])
      >>> variables = layer.init(jax.random.key(0), tokens)
      >>> layer.apply(fixed_point.quantize(variables, bits=8), tokens).shape
      (2, 4)
    """

    def setup(self) -> None:
        """Creates Flax's table, and the product that ``attend`` needs."""
        super().setup()
        self.dot_general = DotGeneral(**self.settings)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Rows of the table for integer ``inputs`` of any shape."""
        table = self.embedding
        if not is_qtensor(table):
            if self.aqt is not None:
                quantizer = self.aqt.fwd.dg_quantizer.rhs
                table = aqt_products.fake_quantize(quantizer, table, range(2))
            if self.bits and self.bits[0]:
                scale = fixed_point.calibrate_scale(table, self.bits[0])
                table = fixed_point.fake_quantize(table, scale, self.bits[0])
            (table,) = dtypes.promote_dtype(table, dtype=self.dtype, inexact=False)
            return jnp.take(table, inputs, axis=0)
        if self.bits and self.bits[0] not in (None, table.bits):
            raise ValueError(
                f"the layer takes bits={self.bits} but its table has {table.bits} bits."
            )
        scale = table.scale
        if scale.ndim and scale.shape[0] > 1:
            scale = jnp.take(scale, inputs, axis=0)
        elif scale.ndim:
            scale = scale[0]
        rows = jnp.take(table.qvalue, inputs, axis=0)
        return (rows.astype(scale.dtype) * scale).astype(self.dtype or scale.dtype)

    def attend(self, query: jax.Array) -> jax.Array:
        """Product of ``query`` [..., features] with every row: [..., embeddings]."""
        query, table = _promote_dtype(query, self.embedding, dtype=self.dtype)
        contract = ((query.ndim - 1,), (1,))
        out: jax.Array = self.dot_general(query, table, (contract, ((), ())))
        return out


class MultiHeadDotProductAttention(_Quantized):
    r"""Multi-head attention with float or fixed-point kernels.

    .. math:: softmax(Q K^T / \sqrt{d}) V

    Parameters have the names and shapes of ``flax.linen``'s module of this name. With
    fixed-point kernels the two products of activations are int8 as well.

    Attributes:
      num_heads: number of heads.
      qkv_features: features of query, key and value over all heads; those of the
        query by default.
      out_features: features of the output; those of the query by default.
      use_bias: whether the projections have a bias.
      dtype: dtype of the computation.
      bits: see `Dense`, as for all that follow.
      activation_scale: "static" or "dynamic".
      calibration: how the scales of activations are found.

    Example:
      >>> layer = MultiHeadDotProductAttention(2, bits=(16, 8))
      >>> x = jnp.ones((1, 5, 8))
      >>> params = layer.init(jax.random.key(0), x)["params"]
      >>> variables = calibrate(layer, {"params": fixed_point.quantize(params)}, x)
      >>> layer.apply(variables, x).shape
      (1, 5, 8)
    """

    num_heads: int
    qkv_features: int | None = None
    out_features: int | None = None
    use_bias: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Attends from ``inputs_q`` to ``inputs_k`` and ``inputs_v``.

        Args:
          inputs_q: [..., queries, features].
          inputs_k: [..., keys, features]; the queries by default.
          inputs_v: [..., keys, features]; the keys by default.
          mask: bool, broadcasts to [..., heads, queries, keys]; True is kept.

        Returns:
          [..., queries, out_features].
        """
        inputs_k = inputs_q if inputs_k is None else inputs_k
        inputs_v = inputs_k if inputs_v is None else inputs_v
        features = self.qkv_features or inputs_q.shape[-1]
        if features % self.num_heads:
            raise ValueError(
                f"qkv_features={features} is no multiple of num_heads={self.num_heads}."
            )
        dense = functools.partial(
            DenseGeneral, use_bias=self.use_bias, dtype=self.dtype, **self.settings
        )
        heads = (self.num_heads, features // self.num_heads)
        query = dense(heads, name="query")(inputs_q) / jnp.sqrt(heads[1])
        key = dense(heads, name="key")(inputs_k)
        value = dense(heads, name="value")(inputs_v)
        # The type of the kernels decides the arithmetic of the two products as well.
        integer = is_qtensor(self.get_variable("params", "query")["kernel"])

        batch = tuple(range(query.ndim - 3))
        head = query.ndim - 2
        # [..., queries, heads, d] · [..., keys, heads, d]
        scores = ActivationDotGeneral(**self.settings, name="scores")(
            query, key, (((head + 1,),) * 2, ((*batch, head),) * 2), integer
        )
        if mask is not None:
            scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores)
        # [..., heads, queries, keys] · [..., keys, heads, d]
        numbers = (
            ((weights.ndim - 1,), (head - 1,)),
            ((*batch, head - 1), (*batch, head)),
        )
        mixed = ActivationDotGeneral(**self.settings, name="mixed")(
            weights, value, numbers, integer
        )
        mixed = jnp.moveaxis(mixed, -3, -2)
        out_features = self.out_features or inputs_q.shape[-1]
        out: jax.Array = dense(out_features, axis=(-2, -1), name="out")(mixed)
        return out


class LSTMCell(_Quantized, nn.RNNCellBase):
    r"""An LSTM cell with float or fixed-point kernels.

    .. math:: i, f, o = σ(W x + U h + b), \quad g = \tanh(W x + U h + b), \quad
      c' = f c + i g, \quad h' = o \tanh(c')

    Parameters have the names and shapes of ``flax.linen.LSTMCell``. Run it
    in `RNN`, which carries its static scales.

    Attributes:
      features: size of the hidden state.
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters and of the carry.
      bits: see `Dense`, as for all that follow.
      activation_scale: "static" or "dynamic".
      calibration: how the scales of input and hidden state are found.

    Example:
      >>> rnn = RNN(LSTMCell(3, bits=(16, 8), activation_scale="dynamic"))
      >>> x = jnp.ones((2, 7, 4))
      >>> variables = rnn.init(jax.random.key(0), x)
      >>> rnn.apply(fixed_point.quantize(variables), x).shape
      (2, 7, 3)
    """

    features: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, jax.Array], inputs: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        """One step: ``(c, h), x -> (c', h'), h'``."""
        c, h = carry
        dense = functools.partial(
            Dense,
            self.features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            **self.settings,
        )

        def gate(name: str) -> jax.Array:
            x_part: jax.Array = dense(use_bias=False, name=f"i{name}")(inputs)
            orthogonal = nn.initializers.orthogonal()
            h_part = dense(kernel_init=orthogonal, name=f"h{name}")(h)
            total: jax.Array = x_part + h_part
            return total

        c = nn.sigmoid(gate("f")) * c + nn.sigmoid(gate("i")) * jnp.tanh(gate("g"))
        h = nn.sigmoid(gate("o")) * jnp.tanh(c)
        return (c, h), h

    @nn.nowrap
    def initialize_carry(
        self, rng: jax.Array, input_shape: tuple[int, ...]
    ) -> tuple[jax.Array, jax.Array]:
        """Zeros for ``(c, h)``, shaped after the input of one step."""
        del rng
        zeros = jnp.zeros((*input_shape[:-1], self.features), self.param_dtype)
        return zeros, zeros

    @property
    def num_feature_axes(self) -> int:
        """Axes of the input that are features."""
        return 1


class RNN(nn.RNN):
    """``flax.linen.RNN`` for cells with static activation scales.

    A scan shares the scales between its steps, and carries them in `calibrate`, where
    each step may raise them. Attributes and parameters are Flax's.

    Example:
      >>> rnn = RNN(LSTMCell(3, bits=(16, 8)))
      >>> x = jnp.ones((2, 7, 4))
      >>> params = fixed_point.quantize(rnn.init(jax.random.key(0), x)["params"])
      >>> rnn.apply(calibrate(rnn, {"params": params}, x), x).shape
      (2, 7, 3)
    """

    @nn.compact
    def __call__(self, inputs: jax.Array, **kwargs: Any) -> Any:
        """See ``flax.linen.RNN``."""
        carried = self.is_mutable_collection(SCALES) and not self.is_initializing()
        scan = nn.RNN(
            self.cell,
            time_major=self.time_major,
            return_carry=self.return_carry,
            reverse=self.reverse,
            keep_order=self.keep_order,
            unroll=self.unroll,
            variable_axes=self.variable_axes,
            variable_broadcast="params" if carried else ("params", SCALES),
            variable_carry=SCALES if carried else False,
            split_rngs=self.split_rngs,
        )
        return scan(inputs, **kwargs)


def _check_bits(bits: Any) -> None:
    """Raises unless these are bits that a layer can have."""
    if bits is None:
        return
    if not isinstance(bits, tuple | list) or len(bits) != 2:  # Flax makes tuples
        raise ValueError(
            "bits must be None or (bits of weights, bits of activations), for example "
            f"(16, 8); got {bits!r}."
        )
    for width, (name, largest) in zip(bits, _WIDEST.items(), strict=True):
        if width is not None:
            fixed_point.max_qvalue(width)
            if width > largest:
                raise ValueError(
                    f"{name} have at most {largest} bits, got bits={bits}."
                )
