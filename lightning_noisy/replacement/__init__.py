"""The activations of any module: finding, replacing and folding them."""
