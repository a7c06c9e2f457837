"""Noise on the gradients of any torch optimizer."""
