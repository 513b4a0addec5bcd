"""A child in the formats of engines, and its speed there."""
