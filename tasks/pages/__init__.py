"""What a run shows: the table of parent, child and baselines (report.py), the HTML page, pictures."""
