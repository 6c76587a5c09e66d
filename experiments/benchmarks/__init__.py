"""Measurements of cost: `main` makes the tables, `z_share` one of its own."""
