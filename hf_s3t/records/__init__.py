"""What a system knows of its examples and deletions, in memory: no disk is touched here."""
