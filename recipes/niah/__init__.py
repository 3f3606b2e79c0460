"""Needle in a video haystack."""
