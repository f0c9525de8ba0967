"""Names of the files in an adapter's folder."""

WEIGHTS = "adapter_model.safetensors"
"""The tensors of an adapter, of this library or of PEFT."""

CONFIG = "adapter_config.json"
"""The description of an adapter."""

PICKLED = "adapter_model.bin"
"""PEFT's older file of tensors. It is a pickle, and never loaded."""
