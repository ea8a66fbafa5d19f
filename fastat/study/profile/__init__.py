"""What every choice costs: ``fastat profile``."""
