"""What rows look like on the wire: codecs, the FP8 tile quantiser and the eight-bit formats."""
