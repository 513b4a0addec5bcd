"""What learns: recorded activations, BLD of every block variant, GKD of a whole child."""
