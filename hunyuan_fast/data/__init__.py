"""Clips on their way in and out: video files, geometry, metrics, synthetic shapes."""
