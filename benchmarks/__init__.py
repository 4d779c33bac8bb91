"""Scripts that measure learning, speed and memory, and the result files that they wrote."""
