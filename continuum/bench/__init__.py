"""What a solve costs beyond its evaluations, here and in other libraries: `continuum bench`."""
