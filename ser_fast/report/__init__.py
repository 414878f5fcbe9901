"""HTML pages that need no other file: one engine, and the comparison of runs."""
