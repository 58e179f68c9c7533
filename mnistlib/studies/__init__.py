"""What single notebooks are about: a file for each that needs one, with the figures it draws."""
