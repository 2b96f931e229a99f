"""Eight-bit floating-point formats and their exact rounding."""
