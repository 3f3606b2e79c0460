"""Tests: unit (one process), distributed (several ranks), functional (recipes), gpu. See CONTRIBUTING.md."""
