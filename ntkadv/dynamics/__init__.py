"""Closed-form training dynamics of infinitely wide networks, with and without attacks."""
