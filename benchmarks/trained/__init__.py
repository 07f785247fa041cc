"""Accuracy, loss and utilization of trained networks."""
