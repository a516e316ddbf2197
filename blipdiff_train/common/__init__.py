"""What every part may use: pure-function randomness, process-group helpers, shape checks, safe files and images."""
