"""Weights on disk: loading by slices, checkpoints, exports."""
