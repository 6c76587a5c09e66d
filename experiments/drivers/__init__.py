"""The loops that the launcher runs; a configuration names its own."""
