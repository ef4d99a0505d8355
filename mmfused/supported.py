"""The versions and GPU architectures that this release is tested with."""

# The workflow runs the suite with all oldest versions together and with all newest ones together.
# pyproject.toml (lower bounds), docs/supported-versions.md and .github/workflows/ci.yml follow it.
TESTED = {  # name on the package index: (oldest, newest)
    "python": ("3.10", "3.13"),
    "torch": ("2.11.0", "2.14.1"),
    "triton": ("3.6.0", "3.8.0"),
    "transformers": ("5.17.0", "5.24.0"),
    "timm": ("1.0.28", "1.0.31"),
    "open_clip_torch": ("3.0.0", "3.3.0"),
    "sentence-transformers": ("6.0.0", "6.2.0"),
    "peft": ("0.19.0", "0.21.2"),
    "datasets": ("4.4.0", "5.2.0"),
}
# Every kernel is compiled with each of these for each architecture; in ascending order.
TRITONS = ("3.6.0", "3.8.0", "3.9.0")
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
