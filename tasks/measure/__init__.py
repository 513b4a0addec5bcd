"""What block variants and whole models cost in an engine."""
