"""Programs for the interpreters beside ours; standard library only."""
