"""Weights people already have: other layouts to ours and back, and what a run starts from."""
