"""MLflow, Prefect's servers and UI, the champion, the state of the machine."""
