"""Measurements: nothing learns. A run of one step, or of as many as the rows are."""
