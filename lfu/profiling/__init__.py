"""What a step takes: time, memory and arithmetic."""
