"""Programs that tests start in processes of their own: `python -m tests.programs.<name>`, from the repository."""
