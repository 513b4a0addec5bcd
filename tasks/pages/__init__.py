"""What a run shows: its report, its page, its pictures."""
