"""The planner: Dataflow x models x workload x cluster -> the best placement, with a certificate. Pure functions.

    case / recipe + cluster
        |  work.py                                     what every node computes
        |  efficiency.py, rates.py, workload.py        what the cluster does a second, and how long texts are
        v
    latency.py, generation.py, transfer.py, memory.py  seconds and bytes of a node under a strategy (cost.py)
        v
    catalogue.py, holdings.py                           per role: strategies that fit and that none dominates
    pools.py                                           per pool: what its roles leave each other
        v
    search.py, boxes.py                                branch and bound over partitions x sizes x strategies
    step_time.py                                       the cost of a plan, and lower bounds of it
        v
    plan.py                                            the best plan, runners-up, certificate (found.py)
    explain.py, emit.py, picture.py, feasible.py       for people, for `run`, drawn, and why nothing fits

    case.py, launch.py                                 the question in a file, and in a run's settings

Datasheets of GPUs and shapes of models lie below (`rlhf_dist/hardware.py`, `model_specs.py`): checks read them too.
docs/planner.md has the model, its constants and what they miss. Nothing here imports torch, ray or an engine.
"""
