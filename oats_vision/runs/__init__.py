"""Whole runs, as the commands and `oats_vision.compress` do them."""
