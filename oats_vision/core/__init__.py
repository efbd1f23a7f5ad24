"""The mathematics of OATS on matrices: no model, no file, no device policy, no name of a method."""
