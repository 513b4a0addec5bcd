"""What is trained: BLD of every block variant on recorded activations, GKD of a whole child."""
