"""Diagnosis: see why a quantized net trains, stalls or lies about its gradients.

Every analysis says which function it looks at: deployed, latent, surrogate or smoothed (`functions`).
"""
