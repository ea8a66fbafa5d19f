"""fastat: train the audio taggers of "AudioTagging Done Right" (2022), fast and faithfully."""

__version__ = "0.1.0"
