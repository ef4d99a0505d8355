"""The training loop behind ``mmfused train``: from a configuration to a finished run folder."""
