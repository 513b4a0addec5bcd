"""Studies of the search: other searches beside it, the truth of its sums, what helps where they fail."""
