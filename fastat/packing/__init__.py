"""Turns tables of audio files into packed sets."""
