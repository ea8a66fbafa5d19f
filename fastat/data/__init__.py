"""Packed audio: readers of label tables, decoding, shards, sampling and loading."""
