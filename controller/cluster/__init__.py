"""Processes: where Ray runs, the pools of workers on it, what they need, how they end."""
