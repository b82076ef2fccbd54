"""Episodes in the process that generates: users' environments beside the generation engine."""
