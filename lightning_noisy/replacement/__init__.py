"""Find, replace and fold the activations of any module."""
