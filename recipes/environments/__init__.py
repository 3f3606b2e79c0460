"""Environments: what answers the model when it has spoken, such as a tool or the other player of a game."""
