"""The Triton versions and GPU architectures that this release is tested with."""

TRITONS = ("3.6.0", "3.8.0", "3.9.0")  # in ascending order
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
