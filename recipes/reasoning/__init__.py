"""Verifiable rewards, and what is made of them: curricula, votes, phases."""
