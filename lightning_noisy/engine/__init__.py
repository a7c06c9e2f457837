"""Plain torch engines: noise on an optimizer, surgery on a module, recording of activations."""
