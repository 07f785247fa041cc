"""Time, memory and communication; random weights."""
