"""What LfU is compared with."""
