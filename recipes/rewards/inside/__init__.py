"""What is handed into the sandbox; nothing here imports the package."""
