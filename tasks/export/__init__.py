"""A child in the formats that engines load, checked after writing."""
