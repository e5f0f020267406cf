"""Text, and the calibration tokens cut from it."""
