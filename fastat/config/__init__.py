"""What a run is told: its options, the paper's procedures and its tables. Imports no torch."""
