"""The planner: Dataflow x models x workload x cluster -> the best placement, with a certificate. Pure functions.

    case / recipe + cluster
        |  work.py       what every node computes            hardware.py, models.py, workload.py, efficiency.py
        v
    latency.py, generation.py, memory.py, transfer.py       seconds and bytes of a node under a strategy
        v
    options.py           per pool: strategies of its roles that fit and are not dominated
        v
    search.py            branch and bound over partitions x allocations x options; cost = schedule.py
        v
    plan.py              the best plan, runners-up, certificate -> explain.py, emit.py, picture.py

Nothing here imports torch, ray or an engine.
"""
