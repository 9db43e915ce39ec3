"""Checks of a machine, of the inputs, and of results."""
