"""Which experts to load ahead of time. Predictions only move bytes: the routers alone decide what is computed."""
