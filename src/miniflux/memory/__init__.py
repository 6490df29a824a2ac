"""Where weights live while they work, and in which precision."""
