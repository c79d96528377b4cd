"""Latent variable models on Pyro, for any (model, guide) pair."""
