"""The command line: it parses options, calls, and prints."""
