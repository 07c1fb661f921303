"""A system on the Hub: pushed, served from there, erased."""
