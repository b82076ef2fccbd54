"""What a user's own file defines (losses, rewards, host ops, states) travels by value in Ray's messages."""

from __future__ import annotations

from ray import cloudpickle

from rlhf_dist.python_files import pickle_by_value_with


def send_user_files_by_value() -> None:
    """Tell Ray's pickler of every user file, loaded already or later; call it before anything is sent."""
    pickle_by_value_with(cloudpickle.register_pickle_by_value)
