"""What everything stands on: errors, files, the terminal, the device, ranks."""
