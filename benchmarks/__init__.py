"""Scripts that measure learning, speed and memory, and the results they wrote."""
