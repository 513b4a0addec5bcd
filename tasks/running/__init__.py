"""A run among others on one machine: progress, turns on a device, retries, leftovers of killed runs."""
