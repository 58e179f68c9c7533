"""What single notebooks draw and measure: a module for each that needs one."""
