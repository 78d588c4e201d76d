"""What more than one test needs, by subject."""
