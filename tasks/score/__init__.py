"""What a block variant hurts: replace-1-block scores."""
