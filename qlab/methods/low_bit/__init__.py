"""Methods that train weights, activations or gradients of a few bits."""
