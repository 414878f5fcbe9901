"""What several test files share; they import from here, and never from each other."""
