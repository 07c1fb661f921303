"""What goes into a pack for an audit as it is: the script that somebody else runs, and what to do with it."""
