"""Methods that train binary weights and activations."""
