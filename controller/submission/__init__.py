"""A run as a job of somebody's cluster: what travels, and Ray Jobs, SLURM and KubeRay behind one interface."""
