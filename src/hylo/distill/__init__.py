"""Training: stage 1 aligns new layers with the base's (align), stage 2 distils a teacher at growing length (extend)."""

from hylo.distill.settings import Training

__all__ = ["Training"]
