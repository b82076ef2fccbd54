"""What is added to a checkpoint's model: adapters and heads."""
