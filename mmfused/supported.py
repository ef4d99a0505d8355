"""The Triton versions and GPU architectures this release is tested with; the only list of them."""

TRITONS = ("3.6.0", "3.8.0", "3.9.0")  # the oldest first
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
