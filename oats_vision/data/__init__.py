"""Pictures and text, for calibration and evaluation."""
