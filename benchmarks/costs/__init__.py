"""Time, memory, communication, and what a run survives; random weights."""
