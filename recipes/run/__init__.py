"""One run of any recipe: its session, folder, starting weights and loop."""
