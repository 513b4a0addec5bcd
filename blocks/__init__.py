"""What a block can be: variants, their initialisation and fits, families, the block library. No Prefect in here."""
