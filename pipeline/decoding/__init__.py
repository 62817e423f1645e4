"""Image formats, and decoding in isolated processes."""
