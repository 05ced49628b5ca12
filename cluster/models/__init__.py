"""Loaded models: the one room of `cluster` that imports torch. Only workers and replicas enter it."""
