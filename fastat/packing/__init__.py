"""Tables of audio files to packed sets."""
