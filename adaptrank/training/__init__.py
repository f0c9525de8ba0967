"""Training around the model: penalties, several processes, and an allocator in a Trainer."""
