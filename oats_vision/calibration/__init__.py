"""What the linears of a model see on calibration data."""
