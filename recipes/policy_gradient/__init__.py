"""A policy learns from rewards of its own responses: losses, advantages, reward shaping, sampling."""
