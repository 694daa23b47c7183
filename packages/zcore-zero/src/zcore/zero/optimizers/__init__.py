"""Optimizers of sharded parameters: torch's, by name, class or object, and those that torch lacks."""
