"""What both training engines compute with: models over packed rows, and their outputs."""
