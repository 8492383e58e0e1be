"""Slipstream's engine: token ids, weights and memory. It knows no UI and prints nothing."""
