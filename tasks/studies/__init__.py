"""Studies of the search: the baselines and other searches beside it, the truth of its sums, what helps if they fail."""
