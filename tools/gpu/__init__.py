"""The sections of tools/gpu_check.py, and what runs them and writes down what they find."""
