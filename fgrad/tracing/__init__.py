"""Traced functions: their graph, what is known of primitives, order of execution."""
