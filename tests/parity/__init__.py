"""Agreement with the reference implementations, on what they computed on tiny random weights."""
