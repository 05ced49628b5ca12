"""What the cluster has (hardware, base models, adapters) and what fits on it."""
