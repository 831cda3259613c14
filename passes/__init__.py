"""fxopt's passes, one rewrite a file. ``available()`` lists them, those of installed plug-ins included."""

from fxopt.registry import available as _available


def available() -> tuple[str, ...]:
    """Names of all passes that can stand in a spec string."""
    return _available("fxopt.passes")
