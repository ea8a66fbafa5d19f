"""fastat's operators, each usable alone."""
