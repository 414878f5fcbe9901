"""Sources of pictures, and the batches that are loaded from them."""

MAX_PIXELS = 178_956_970
"""Of one picture: from there on PIL refuses to decode."""
