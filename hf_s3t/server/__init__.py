"""A system in production: it answers over HTTP, forgets while it answers, and takes up what is grown again."""
