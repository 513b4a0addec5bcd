"""The search: a choice in numbers, solved, asked in words, explained where it is infeasible."""
