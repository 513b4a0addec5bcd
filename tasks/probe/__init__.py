"""Where a child breaks though its average looks fine: other text, long text, confidence, further training, answers."""
