"""Hundreds of small programs run a few times each: compile fast rather than well."""

import functools

import jax


def _accepted(options):
    """Those that this version of XLA knows on this device."""

    def known(name, value):
        try:
            jax.jit(lambda x: x, compiler_options={name: value}).lower(0).compile()
        except jax.errors.JaxRuntimeError:
            return False
        return True

    return {name: value for name, value in options.items() if known(name, value)}


fast_jit = functools.partial(
    jax.jit,
    compiler_options=_accepted(
        {
            "xla_backend_optimization_level": 0,
            "xla_llvm_disable_expensive_passes": True,
            "xla_cpu_use_fusion_emitters": False,
            "xla_cpu_parallel_codegen_split_count": 1,
        }
    ),
)
