"""Model definitions whose parameter trees match published checkpoints."""
