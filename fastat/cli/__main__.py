"""``python -m fastat.cli``."""

from fastat.cli.app import main

main()
