"""Sweeps: search for settings of training (Ray Tune) and of answering (cached logits scored again)."""
