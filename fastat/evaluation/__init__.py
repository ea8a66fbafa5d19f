"""Scores of a model on a labelled set, and what it says of any recording."""
