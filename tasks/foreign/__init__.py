"""Libraries of others: read, checked, written."""
