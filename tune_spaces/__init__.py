"""Search spaces over the presets, as plain Python."""
