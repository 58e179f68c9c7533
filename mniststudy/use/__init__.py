"""A trained network in use: reading pictures, export, calibration."""
