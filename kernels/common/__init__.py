"""Helpers that two rooms or more share."""
