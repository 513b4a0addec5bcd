"""Block libraries of others, read and written."""
