from fastmoco.kernels.reference import enqueue  # noqa: F401
