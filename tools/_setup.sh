# Sourced by every tool, from any directory: makes .venv and installs fxopt and what its tools need.
# A stamp remembers what was installed, so that the next run starts at once.
# Sets ROOT (the repository) and PYTHON (the interpreter of .venv).

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
PYTHON="$VENV/bin/python"

_fxopt_setup() {
    local wanted
    wanted="$(cat "$ROOT/pyproject.toml" "$ROOT/tools/_setup.sh" | sha256sum)"
    if [[ -x "$PYTHON" && "$(cat "$VENV/.fxopt-setup" 2>/dev/null)" == "$wanted" ]]; then
        return
    fi
    echo "setting up $VENV (once; the next run starts at once)" >&2
    if [[ ! -x "$PYTHON" ]]; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
            echo "fxopt needs Python 3.11 or newer as python3" >&2
            return 1
        }
        python3 -m venv "$VENV"
    fi
    # torch by itself and first: this pin keeps a CPU build when pip is offered one, and nothing after it may replace it.
    "$PYTHON" -m pip install --quiet "torch==2.13.0"
    # torchvision has no CPU build of its own; without dependencies it works beside any torch (tools/models.py).
    "$PYTHON" -m pip install --quiet --no-deps "torchvision==0.28.0"
    "$PYTHON" -m pip install --quiet --editable "$ROOT[dev]"
    echo "$wanted" > "$VENV/.fxopt-setup"
}

_fxopt_setup || exit 1
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
