"""HTTP endpoints: Ray Serve applications."""
