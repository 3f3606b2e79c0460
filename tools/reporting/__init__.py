"""The parts of tools/report.py: a run's folder read, what is drawn of it, and the page."""
