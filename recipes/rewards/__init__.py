"""Rewards: what a response is worth, by name or dotted path."""
