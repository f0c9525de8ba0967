"""Training strategies: one paper, one file. The folder is the registry."""
