"""A model compressed block by block, by OATS or by a method to compare it with."""
