"""Parent and child under load, in turns."""
