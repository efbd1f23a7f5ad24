"""Models: how they are found, built and described."""
