"""Runs that share what they work on, and what happens when something goes wrong."""
