"""What a run tells: metrics, trackers, timeline, summary."""
