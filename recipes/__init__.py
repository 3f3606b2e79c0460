"""Recipes: one entry script for each algorithm, and the rooms they are made of."""
