"""Momentum contrast: queue, shuffle, update, and the step that joins them."""
