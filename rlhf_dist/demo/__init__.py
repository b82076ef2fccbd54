"""What `rlhf-dist demo` and `make smollm2` are made of: a task, a small model, a model that is prepared once."""
