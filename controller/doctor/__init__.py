"""`rlhf-dist doctor`: what of a machine or a cluster would stop a run, in two minutes, with what to do.

command.py     the command: one check after the other, a line each, JSON, exit code
catalogue.py   the one list of checks
subject.py     what is looked at: the cluster, facts of each node, a pool of ranks
versions, machines, network, storage, ranks, engines    the checks, a file for each family
"""
