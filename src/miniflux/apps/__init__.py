"""Thin fronts to the library: they parse, call and show."""
