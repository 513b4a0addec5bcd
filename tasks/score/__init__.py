"""How much each block variant hurts the parent: replace-1-block scores."""
