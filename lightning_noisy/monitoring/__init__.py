"""Recording what activations do."""
