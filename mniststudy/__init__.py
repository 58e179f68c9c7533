"""The study around `mnistlib`: many runs, their figures, and the use of a trained network."""
