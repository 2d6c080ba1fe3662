"""Calibration: tokens through the model, block by block, into moments."""
