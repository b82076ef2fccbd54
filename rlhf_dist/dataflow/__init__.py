"""RLHF as a dataflow: recipes, host ops, tracing and the graph."""

from rlhf_dist.dataflow.graph import ColumnOrigin, Dataflow, Edge, GraphError, Input, Node
from rlhf_dist.dataflow.host import HostOp, HostResult, host_op
from rlhf_dist.dataflow.refill import refill

__all__ = [
    "ColumnOrigin",
    "Dataflow",
    "Edge",
    "GraphError",
    "HostOp",
    "HostResult",
    "Input",
    "Node",
    "host_op",
    "refill",
]
