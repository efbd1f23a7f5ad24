"""The module classes that compressed models are made of."""
