"""Packed audio: shards, sampling and loading; the practice set."""
