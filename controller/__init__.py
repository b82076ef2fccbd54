"""What runs once: the cluster, worker groups, the graph's execution, checkpoints, metrics; and `launch` for Python."""

from controller.lifecycle.api import RunResult, launch, launch_stages

__all__ = ["RunResult", "launch", "launch_stages"]
