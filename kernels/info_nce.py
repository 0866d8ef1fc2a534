from fastmoco.kernels.reference import info_nce  # noqa: F401
