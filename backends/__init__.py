"""fxopt's backends, one engine a file. ``available()`` lists them, those of installed plug-ins included."""

from fxopt.registry import available as _available


def available() -> tuple[str, ...]:
    """Names of all backends; one that is listed may still need its engine installed."""
    return _available("fxopt.backends")
