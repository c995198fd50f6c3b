"""Networks: flax.nnx modules that map (x_t, t) to an output of x_t's shape."""
