"""The parts of tools/convert_hf.py: its command line, the models that it is given, and what is compared with transformers."""
