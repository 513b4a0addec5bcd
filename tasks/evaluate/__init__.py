"""How good whole models are: quality on unseen text, benchmarks, comparisons."""
