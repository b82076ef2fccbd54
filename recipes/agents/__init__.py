"""Environments, tools, search, and writers of prompts for other models."""
