"""Looks into traced programs, as far as the integer products go."""

import functools

import jax

from fgrad.fixed_point import products


def all_equations(jaxpr):
    """The equations of a jaxpr, of its sub-jaxprs and of our primitives."""
    primitives = {
        products.integer_dot_general_p: products._integer_dot,
        products.integer_conv_p: products._integer_conv,
    }
    for equation in jaxpr.eqns:
        if equation.primitive in primitives:
            function = primitives[equation.primitive]
            function = functools.partial(function, **equation.params)
            avals = [v.aval for v in equation.invars]
            yield from all_equations(jax.make_jaxpr(function)(*avals).jaxpr)
            continue
        yield equation
        for parameter in jax.tree.leaves(
            equation.params, is_leaf=lambda p: hasattr(p, "jaxpr") or hasattr(p, "eqns")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from all_equations(inner)


def product_equations(jaxpr):
    names = ("dot_general", "conv_general_dilated")
    return [e for e in all_equations(jaxpr) if e.primitive.name in names]
