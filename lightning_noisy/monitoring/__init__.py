"""Records statistics of activations."""
