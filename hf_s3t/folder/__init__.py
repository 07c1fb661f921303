"""A system's folder: what lies in it, how it is read and written, and which of its stages are valid."""
