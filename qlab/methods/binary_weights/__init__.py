"""Methods that train binary weights; activations stay in float."""
