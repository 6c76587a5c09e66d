"""Measurements of cost; each prints its table and writes JSON if asked."""
