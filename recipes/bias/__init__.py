"""Gender bias: evaluation, locating, LFTF."""
