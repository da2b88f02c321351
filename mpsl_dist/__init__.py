"""mpsl_dist: the distributed runtime for Multimodal Parallel Split Learning (MPSL)."""

__version__ = "0.1.0"
