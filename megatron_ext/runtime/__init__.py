"""Process groups, devices, seeds, checkpoints, timers.

Imports nothing: install_check, which this package holds, must run before Megatron is imported.
"""
