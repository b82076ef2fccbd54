"""The planner: Dataflow x models x workload x cluster -> the best placement, with a certificate. Pure functions.

    case / recipe + cluster
        |  work.py       what every node computes            hardware.py, models.py, workload.py, efficiency.py
        v
    latency.py, generation.py, memory.py, transfer.py       cost.py: seconds and bytes of a node under a strategy
        v
    catalogue.py, layouts.py       per role: strategies that fit and that none dominates; pools.py: what roles leave each other
        v
    search.py, boxes.py            branch and bound over partitions x sizes x strategies; cost = schedule.py
        v
    plan.py                        the best plan, runners-up, certificate -> explain.py, emit.py, picture.py; feasible.py: none

    case.py, launch.py   the question in a file, and in a run's settings

docs/planner.md has the model, its constants and what they miss. Nothing here imports torch, ray or an engine.
"""
