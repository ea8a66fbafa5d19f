"""What everything else stands on: the device and what suits it."""
