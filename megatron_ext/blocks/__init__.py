"""Single blocks of a model: taken alone, ranked by what they have to do with a bias, kept as a delta."""
