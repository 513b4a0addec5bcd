"""One stage of the pipeline each: a plain function first, a Prefect task second."""
