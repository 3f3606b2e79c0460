"""Group relative policy optimisation with a shared prefix."""
