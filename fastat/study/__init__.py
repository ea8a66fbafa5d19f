"""What a choice costs and is worth: profile, compare, ablate, landscape, report."""
