"""What is wanted: deployment profiles (YAML -> frozen pydantic values). No torch, no Prefect in here."""
