"""The pipeline as Prefect flows, and the command line. Wiring only."""
