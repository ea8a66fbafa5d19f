"""``fastat report``: runs, profiles and benchmark results on one self-contained HTML page."""
