"""Silence for warnings that a user of sigjax can do nothing about."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Hides the warnings of anndata, scanpy, pandas and umap on their own futures."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
