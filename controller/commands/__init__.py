"""What `rlhf-dist` does, one file a command; `cli` reads the command line."""
