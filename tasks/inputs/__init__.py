"""What comes in: the parent, the corpus, the search space of a parent."""
