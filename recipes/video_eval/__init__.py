"""Multiple-choice questions about videos."""
