"""Datasets on disk: download them, unpack them, and report what is missing or damaged."""
