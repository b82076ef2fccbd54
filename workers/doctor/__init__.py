"""What `rlhf-dist doctor` tries on ranks: workers of a role each, whose construction tries it.

It raises, or `remarks` has one text of what was found; rank 0's is shown.
"""
