"""Controls: what an allocator is compared with. They are no methods, and have no paper.

The folder is a registry of its own, so that tables of methods do not list them.
"""
