"""Models that score or compare responses, and how they are kept honest."""
