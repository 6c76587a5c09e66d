"""Configurations, one file per experiment."""
