"""A way to train as pure functions: what a step does, and what it needs."""
