"""FP8 arithmetic: tiles and blocks, casts to them, products of them, and the policy of what stays high."""
